/*
 * test_crypt.c - the modes of operation, without Python and without a real cipher
 *
 * Sectors are encrypted block by block as the definitions say, with a toy of a cipher, and have to come back.
 */
#include "toycipher.h"

#include <stdio.h>
#include <stdlib.h>

static void test_there_and_back(fq_mode mode, fq_iv vectors, size_t block, size_t sectors, uint64_t first)
{
    const size_t nbytes = sectors * FQ_SECTOR_NBYTES;
    uint8_t *plain = malloc(nbytes + 1), *buf = malloc(nbytes + 1), *work = malloc(FQ_CRYPT_WORK_NBYTES);
    toy t = {block, 0, 0};
    const fq_crypt c = {mode, vectors, (uint32_t)block, false, run_toy, &t};

    CHECK(plain && buf && work);
    for (size_t i = 0; i < nbytes; i++)
        plain[i] = (uint8_t)(i * 7 + i / 512);
    memcpy(buf, plain, nbytes);
    for (size_t i = 0; i < sectors; i++)
        encrypt_sector(&c, buf + i * FQ_SECTOR_NBYTES, first + i);
    CHECK(sectors == 0 || memcmp(buf, plain, nbytes) != 0);
    CHECK(fq_crypt_decrypt(&c, (void *)(uintptr_t)&keys, buf, nbytes, first, work) == FQ_OK);
    CHECK(memcmp(buf, plain, nbytes) == 0);
    free(plain);
    free(buf);
    free(work);
}

/* Whichever call of a cipher fails, the status says so, and no other is made. */
static void test_cipher_that_fails(void)
{
    uint8_t buf[FQ_SECTOR_NBYTES] = {0}, *work = malloc(FQ_CRYPT_WORK_NBYTES);

    CHECK(work);
    for (int mode = 0; mode < FQ_MODE_COUNT; mode++) {
        toy t = {16, 0, 0};
        fq_crypt c = {(fq_mode)mode, FQ_IV_ESSIV, 16, false, run_toy, &t};
        int calls;

        CHECK(fq_crypt_decrypt(&c, (void *)(uintptr_t)&keys, buf, sizeof(buf), 1, work) == FQ_OK);
        calls = t.calls;
        for (int i = 1; i <= calls; i++) {
            t.calls = 0;
            t.fails_at = i;
            CHECK(fq_crypt_decrypt(&c, (void *)(uintptr_t)&keys, buf, sizeof(buf), 1, work) == FQ_ERR_DECRYPT);
            CHECK(t.calls == i);
        }
    }
    free(work);
}

static void test_arguments(void)
{
    uint8_t buf[FQ_SECTOR_NBYTES], work[1];
    toy t = {16, 0, 0};
    fq_crypt c = {FQ_MODE_XTS, FQ_IV_PLAIN, 8, false, run_toy, &t};

    CHECK(fq_crypt_decrypt(&c, NULL, buf, sizeof(buf), 0, work) == FQ_ERR_ARGUMENT);
    c.block_nbytes = 32;
    CHECK(fq_crypt_decrypt(&c, NULL, buf, sizeof(buf), 0, work) == FQ_ERR_ARGUMENT);
    c.block_nbytes = 16;
    CHECK(fq_crypt_decrypt(&c, NULL, buf, sizeof(buf) - 1, 0, work) == FQ_ERR_ARGUMENT);
    CHECK(t.calls == 0);
}

int main(void)
{
    static const uint64_t firsts[] = {0, 1, 0xffffffff, UINT64_MAX / 512};

    for (int mode = 0; mode < FQ_MODE_COUNT; mode++)
        for (int vectors = 0; vectors < FQ_IV_COUNT; vectors++)
            for (size_t i = 0; i < sizeof(firsts) / sizeof(*firsts); i++)
                for (size_t sectors = 0; sectors < 300; sectors = sectors * 2 + 1) {
                    test_there_and_back((fq_mode)mode, (fq_iv)vectors, 16, sectors, firsts[i]);
                    if (mode != FQ_MODE_XTS)
                        test_there_and_back((fq_mode)mode, (fq_iv)vectors, 8, sectors, firsts[i]);
                }
    test_cipher_that_fails();
    test_arguments();
    puts("crypt: all tests passed");
    return 0;
}
