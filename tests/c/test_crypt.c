/*
 * test_crypt.c - the modes of operation, without Python and without a real cipher
 *
 * The cipher here turns the bytes of a block round and adds the key; it keeps no secret, but mixes up nothing that a mode must not
 * mix up. Sectors are encrypted block by block as the definitions say, which is slow and plain, and have to come back.
 */
#include "internal.h"
#include "testing.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct toy {
    size_t block;
    int calls, fails_at; /* 0: never */
} toy;

static const uint8_t keys[] = {17, 17, 99, 201};

static void encrypt_block(fq_cipher which, uint8_t *at, size_t block)
{
    uint8_t turned[16];

    for (size_t i = 0; i < block; i++)
        turned[(i + 3) % block] = (uint8_t)(at[i] + keys[which]);
    memcpy(at, turned, block);
}

static void decrypt_block(fq_cipher which, uint8_t *at, size_t block)
{
    uint8_t turned[16];

    for (size_t i = 0; i < block; i++)
        turned[i] = (uint8_t)(at[(i + 3) % block] - keys[which]);
    memcpy(at, turned, block);
}

static int run(void *opaque, void *user, fq_cipher which, uint8_t *blocks, size_t nbytes)
{
    toy *t = opaque;

    CHECK(user == &keys && nbytes > 0 && nbytes % t->block == 0);
    if (++t->calls == t->fails_at)
        return -1;
    for (size_t at = 0; at < nbytes; at += t->block)
        (which == FQ_CIPHER_DATA ? decrypt_block : encrypt_block)(which, blocks + at, t->block);
    return 0;
}

static void xor_block(uint8_t *to, const uint8_t *from, size_t block)
{
    for (size_t i = 0; i < block; i++)
        to[i] ^= from[i];
}

static void encrypt_sector(const fq_crypt *c, uint8_t *at, uint64_t sector)
{
    const size_t block = c->block_nbytes;
    uint8_t vector[16] = {0}, tweaked[16];

    for (size_t i = 0; i < (c->vectors == FQ_IV_PLAIN ? 4 : 8); i++)
        vector[i] = (uint8_t)(sector >> 8 * i);
    if (c->vectors == FQ_IV_ESSIV)
        encrypt_block(FQ_CIPHER_VECTORS, vector, block);
    if (c->mode == FQ_MODE_XTS)
        encrypt_block(FQ_CIPHER_TWEAKS, vector, block);
    for (size_t done = 0; done < FQ_SECTOR_NBYTES; done += block, at += block) {
        switch (c->mode) {
        case FQ_MODE_CBC:
            xor_block(at, vector, block);
            encrypt_block(FQ_CIPHER_DATA, at, block);
            memcpy(vector, at, block);
            break;
        case FQ_MODE_CTR:
            memcpy(tweaked, vector, block);
            encrypt_block(FQ_CIPHER_COUNTERS, tweaked, block);
            xor_block(at, tweaked, block);
            for (size_t i = block; i > 0 && ++vector[i - 1] == 0; i--)
                ;
            break;
        case FQ_MODE_XTS: {
            const bool carry = vector[15] & 0x80;

            xor_block(at, vector, block);
            encrypt_block(FQ_CIPHER_DATA, at, block);
            xor_block(at, vector, block);
            for (int i = 15; i > 0; i--)
                vector[i] = (uint8_t)(vector[i] << 1 | vector[i - 1] >> 7);
            vector[0] = (uint8_t)(vector[0] << 1 ^ (carry ? 0x87 : 0));
            break;
        }
        default:
            encrypt_block(FQ_CIPHER_DATA, at, block);
        }
    }
}

static void test_there_and_back(fq_mode mode, fq_iv vectors, size_t block, size_t sectors, uint64_t first)
{
    const size_t nbytes = sectors * FQ_SECTOR_NBYTES;
    uint8_t *plain = malloc(nbytes + 1), *buf = malloc(nbytes + 1), *work = malloc(FQ_CRYPT_WORK_NBYTES);
    toy t = {block, 0, 0};
    const fq_crypt c = {mode, vectors, (uint32_t)block, false, run, &t};

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
        fq_crypt c = {(fq_mode)mode, FQ_IV_ESSIV, 16, false, run, &t};
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
    fq_crypt c = {FQ_MODE_XTS, FQ_IV_PLAIN, 8, false, run, &t};

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
