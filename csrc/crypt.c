/*
 * crypt.c - sectors of 512 bytes to plain text: cipher modes and initialisation vectors
 *
 * The ciphers themselves are not here: somebody else's library has them. It is asked, by a callback, to run many blocks through a
 * cipher at once, each for itself; what chains the blocks of a sector together, and tells the sectors apart, is done here for many
 * sectors between two such calls. So a library that costs microseconds a call, as one that is reached through Python does, still
 * decrypts at nearly the speed of its cipher, and a cipher of whatever library works in every mode.
 *
 * All modes need a stream as long as the data, which is why there is a piece's worth of working memory: in XTS the tweaks, in CBC
 * the cipher text of the blocks before, in CTR the counters.
 */
#include "internal.h"

#include <string.h>

static void store_le64(uint8_t *p, uint64_t x)
{
    for (int i = 0; i < 8; i++)
        p[i] = (uint8_t)(x >> (8 * i));
}

static uint64_t load_le64(const uint8_t *p)
{
    uint64_t x = 0;

    for (int i = 0; i < 8; i++)
        x |= (uint64_t)p[i] << (8 * i);
    return x;
}

static void xor_bytes(uint8_t *to, const uint8_t *from, size_t nbytes)
{
    for (size_t i = 0; i < nbytes; i++)
        to[i] ^= from[i];
}

/* One vector a sector, block_nbytes each. */
static fq_status make_vectors(const fq_crypt *c, void *user, uint8_t *vectors, size_t sectors, uint64_t sector)
{
    memset(vectors, 0, sectors * c->block_nbytes);
    for (size_t i = 0; i < sectors; i++)
        store_le64(vectors + i * c->block_nbytes, c->vectors == FQ_IV_PLAIN ? (uint32_t)(sector + i) : sector + i);
    if (c->vectors == FQ_IV_ESSIV && c->run(c->opaque, user, FQ_CIPHER_VECTORS, vectors, sectors * c->block_nbytes))
        return FQ_ERR_DECRYPT;
    return FQ_OK;
}

/* The tweaks of a sector's blocks: each is the one before, multiplied by x in GF(2^128) (IEEE 1619). */
static void expand_tweaks(uint8_t *tweaks, const uint8_t *first)
{
    uint64_t low = load_le64(first), high = load_le64(first + 8);

    for (size_t at = 0; at < FQ_SECTOR_NBYTES; at += 16) {
        const uint64_t carry = high >> 63;

        store_le64(tweaks + at, low);
        store_le64(tweaks + at + 8, high);
        high = high << 1 | low >> 63;
        low = low << 1 ^ carry * 0x87;
    }
}

/* The counters of a sector's blocks: the vector counted up as one big-endian number. */
static void expand_counters(uint8_t *counters, const uint8_t *first, size_t block_nbytes)
{
    memcpy(counters, first, block_nbytes);
    for (size_t at = block_nbytes; at < FQ_SECTOR_NBYTES; at += block_nbytes) {
        size_t i = block_nbytes;

        memcpy(counters + at, counters + at - block_nbytes, block_nbytes);
        while (i > 0 && ++counters[at + --i] == 0)
            ;
    }
}

static fq_status decrypt_piece(const fq_crypt *c, void *user, uint8_t *buf, size_t nbytes, uint64_t sector, uint8_t *stream)
{
    const size_t sectors = nbytes / FQ_SECTOR_NBYTES, block = c->block_nbytes;
    uint8_t *vectors = stream + FQ_CRYPT_PIECE_NBYTES;
    fq_status status = FQ_OK;

    if (c->mode != FQ_MODE_ECB)
        status = make_vectors(c, user, vectors, sectors, sector);
    if (status != FQ_OK)
        return status;
    if (c->mode == FQ_MODE_XTS) {
        if (c->run(c->opaque, user, FQ_CIPHER_TWEAKS, vectors, sectors * block))
            return FQ_ERR_DECRYPT;
        for (size_t i = 0; i < sectors; i++)
            expand_tweaks(stream + i * FQ_SECTOR_NBYTES, vectors + i * block);
        xor_bytes(buf, stream, nbytes);
    } else if (c->mode == FQ_MODE_CBC) {
        memcpy(stream + block, buf, nbytes - block);
        for (size_t i = 0; i < sectors; i++)
            memcpy(stream + i * FQ_SECTOR_NBYTES, vectors + i * block, block);
    } else if (c->mode == FQ_MODE_CTR) {
        for (size_t i = 0; i < sectors; i++)
            expand_counters(stream + i * FQ_SECTOR_NBYTES, vectors + i * block, block);
        if (c->run(c->opaque, user, FQ_CIPHER_COUNTERS, stream, nbytes))
            return FQ_ERR_DECRYPT;
    }
    if (c->mode != FQ_MODE_CTR && c->run(c->opaque, user, FQ_CIPHER_DATA, buf, nbytes))
        return FQ_ERR_DECRYPT;
    if (c->mode != FQ_MODE_ECB)
        xor_bytes(buf, stream, nbytes);
    return FQ_OK;
}

fq_status fq_crypt_decrypt(const fq_crypt *c, void *user, uint8_t *buf, size_t nbytes, uint64_t sector, uint8_t *work)
{
    if ((c->block_nbytes != 8 && c->block_nbytes != 16) || (c->mode == FQ_MODE_XTS && c->block_nbytes != 16) ||
        nbytes % FQ_SECTOR_NBYTES)
        return FQ_ERR_ARGUMENT;
    for (size_t at = 0, n; at < nbytes; at += n) {
        fq_status status;

        n = nbytes - at < FQ_CRYPT_PIECE_NBYTES ? nbytes - at : FQ_CRYPT_PIECE_NBYTES;
        status = decrypt_piece(c, user, buf + at, n, sector + at / FQ_SECTOR_NBYTES, work);
        if (status != FQ_OK)
            return status;
    }
    return FQ_OK;
}
