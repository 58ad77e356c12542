/*
 * toycipher.h - a block cipher that keeps no secret, and sectors encrypted with it
 *
 * It turns the bytes of a block round and adds the key, and so mixes up nothing that a mode of operation must not mix up. Sectors
 * are encrypted block by block as the definitions of the modes say, which is slow and plain.
 */
#ifndef FASTQCOW_TOYCIPHER_H
#define FASTQCOW_TOYCIPHER_H

#include "internal.h"
#include "testing.h"

#include <string.h>

typedef struct toy {
    size_t block;
    int calls, fails_at; /* 0: never */
} toy;

static const uint8_t keys[] = {17, 17, 99, 201};

static inline void encrypt_block(fq_cipher which, uint8_t *at, size_t block)
{
    uint8_t turned[16];

    for (size_t i = 0; i < block; i++)
        turned[(i + 3) % block] = (uint8_t)(at[i] + keys[which]);
    memcpy(at, turned, block);
}

static inline void decrypt_block(fq_cipher which, uint8_t *at, size_t block)
{
    uint8_t turned[16];

    for (size_t i = 0; i < block; i++)
        turned[i] = (uint8_t)(at[(i + 3) % block] - keys[which]);
    memcpy(at, turned, block);
}

static inline int run_toy(void *opaque, void *user, fq_cipher which, uint8_t *blocks, size_t nbytes)
{
    toy *t = opaque;

    CHECK(user == &keys && nbytes > 0 && nbytes % t->block == 0);
    if (++t->calls == t->fails_at)
        return -1;
    for (size_t at = 0; at < nbytes; at += t->block)
        (which == FQ_CIPHER_DATA ? decrypt_block : encrypt_block)(which, blocks + at, t->block);
    return 0;
}

static inline void xor_block(uint8_t *to, const uint8_t *from, size_t block)
{
    for (size_t i = 0; i < block; i++)
        to[i] ^= from[i];
}

static inline void encrypt_sector(const fq_crypt *c, uint8_t *at, uint64_t sector)
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

#endif
