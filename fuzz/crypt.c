/*
 * crypt.c - sectors encrypted with a toy of a cipher come back, in every mode, and nothing beside them is touched
 *
 * The input is the mode, the vectors, the size of a block and how many sectors, a byte each; the number of the first sector, in
 * eight bytes; at which call the cipher fails, in one; and the sectors' contents, which are repeated.
 */
#include "fuzz.h"
#include "toycipher.h"

enum { SECTORS_MAX = 300 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    static arena room, work_room;
    static uint8_t plain[SECTORS_MAX * FQ_SECTOR_NBYTES];
    input in = {data, nbytes};
    const fq_mode mode = (fq_mode)(take_number(&in, 1) % FQ_MODE_COUNT);
    const fq_iv vectors = (fq_iv)(take_number(&in, 1) % FQ_IV_COUNT);
    const uint32_t block = take_number(&in, 1) % 2 && mode != FQ_MODE_XTS ? 8 : 16;
    const size_t number = (size_t)take_number(&in, 1), sectors = number < 250 ? number % 8 : (number - 249) * SECTORS_MAX / 6;
    const size_t all = sectors * FQ_SECTOR_NBYTES;
    const uint64_t first = take_number(&in, 8) % (UINT64_MAX / FQ_SECTOR_NBYTES);
    toy t = {block, 0, (int)take_number(&in, 1)};
    const fq_crypt c = {mode, vectors, block, false, run_toy, &t};

    if (!room.start) {
        room = new_arena(sizeof(plain));
        work_room = new_arena(FQ_CRYPT_WORK_NBYTES);
    }
    for (size_t i = 0; i < all; i++)
        plain[i] = (uint8_t)(in.left ? in.at[i % in.left] + i / FQ_SECTOR_NBYTES : i);
    for (side side = BEFORE; side < SIDES; side++) {
        uint8_t *buf = guarded_at(&room, side, all);
        fq_status status;

        memcpy(buf, plain, all);
        for (size_t i = 0; i < sectors; i++)
            encrypt_sector(&c, buf + i * FQ_SECTOR_NBYTES, first + i);
        t.calls = 0;
        status =
            fq_crypt_decrypt(&c, (void *)(uintptr_t)&keys, buf, all, first, guarded_at(&work_room, side, FQ_CRYPT_WORK_NBYTES));
        if (t.fails_at && t.calls >= t.fails_at)
            CHECK(status == FQ_ERR_DECRYPT && t.calls == t.fails_at);
        else
            CHECK(status == FQ_OK && memcmp(buf, plain, all) == 0);
    }
    return 0;
}
