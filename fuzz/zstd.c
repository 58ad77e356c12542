/*
 * zstd.c - inflating zstd: within its buffers, and of the opinion that QEMU's way of doing it has
 *
 * The input is what to do, in a byte; the length of a cluster less one, in two bytes; and a stream, or, as libzstd is not
 * instrumented and a fuzzer alone finds few of its streams, what to make one of: frames with options of their own, and then damage.
 */
#include "fuzz.h"

#include <zstd.h>

enum { OUT_NBYTES_MAX = 1 << 16, IN_NBYTES_MAX = 1 << 18, PIECE_NBYTES_MAX = 1 << 16, WINDOW_BITS_MAX = 27 };

static arena in_room, out_room;
static ZSTD_CCtx *encoder;
static ZSTD_DCtx *decoder;

/* One frame: its options, how many bytes it has and how often they are repeated, and the bytes. */
static size_t make_frame(input *in, uint8_t *to, size_t room)
{
    static uint8_t piece[PIECE_NBYTES_MAX];
    const unsigned options = (unsigned)take_number(in, 1), window = (unsigned)take_number(in, 1);
    const size_t wanted = (size_t)take_number(in, 2) % 300, times = (size_t)take_number(in, 1) + 1;
    const size_t once = wanted < in->left ? wanted : in->left;
    ZSTD_inBuffer from = {piece, 0, 0};
    ZSTD_outBuffer out = {to, room, 0};

    if ((options & 0xe0) == 0xe0) { /* a frame to be skipped */
        if (room < 8 + once)
            return 0;
        memcpy(to, (const uint8_t[8]){0x50 | (options & 15), 0x2a, 0x4d, 0x18, (uint8_t)once, (uint8_t)(once >> 8), 0, 0}, 8);
        memcpy(to + 8, in->at, once);
        in->at += once;
        in->left -= once;
        return 8 + once;
    }
    for (size_t i = 0; i < times && once > 0 && from.size + once <= PIECE_NBYTES_MAX; i++, from.size += once)
        memcpy(piece + from.size, in->at, once);
    in->at += once;
    in->left -= once;
    ZSTD_CCtx_reset(encoder, ZSTD_reset_session_and_parameters);
    ZSTD_CCtx_setParameter(encoder, ZSTD_c_compressionLevel, (int)(options & 7) - 2);
    ZSTD_CCtx_setParameter(encoder, ZSTD_c_checksumFlag, options >> 3 & 1);
    ZSTD_CCtx_setParameter(encoder, ZSTD_c_contentSizeFlag, options >> 4 & 1);
    if (window >= 10 && window <= 20)
        ZSTD_CCtx_setParameter(encoder, ZSTD_c_windowLog, (int)window);
    if (options >> 4 & 1) {
        const size_t n = ZSTD_compress2(encoder, to, room, piece, from.size);

        return ZSTD_isError(n) ? 0 : n;
    }
    return ZSTD_compressStream2(encoder, &out, &from, ZSTD_e_end) == 0 ? out.pos : 0;
}

/* `what`: how many frames, and how many bytes are changed after that. */
static size_t make_stream(input *in, unsigned what, uint8_t *to, size_t room)
{
    size_t nbytes = 0;

    for (unsigned i = 0; i <= (what & 3); i++)
        nbytes += make_frame(in, to + nbytes, room - nbytes);
    for (unsigned i = 0; i < (what >> 2 & 3) && nbytes > 0; i++) {
        const size_t at = (size_t)take_number(in, 2) % nbytes;

        to[at] ^= (uint8_t)take_number(in, 1);
    }
    return nbytes;
}

/* Frame after frame by the streaming interface, until the cluster is full; which has to be where a frame ends. */
static bool inflate_as_qemu(const uint8_t *stream, size_t nbytes, uint8_t *out, size_t out_nbytes)
{
    ZSTD_inBuffer from = {stream, nbytes, 0};
    ZSTD_outBuffer to = {out, out_nbytes, 0};
    size_t left = 0;

    ZSTD_DCtx_reset(decoder, ZSTD_reset_session_only);
    while (to.pos < to.size) {
        const size_t read = from.pos, written = to.pos;

        left = ZSTD_decompressStream(decoder, &to, &from);
        if (ZSTD_isError(left) || (from.pos == read && to.pos == written))
            return false;
    }
    return left == 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    static uint8_t stream[IN_NBYTES_MAX], out[SIDES][OUT_NBYTES_MAX], expected[OUT_NBYTES_MAX];
    input in = {data, nbytes};
    const unsigned what = (unsigned)take_number(&in, 1);
    const size_t out_nbytes = (size_t)take_number(&in, 2) + 1;
    size_t in_nbytes = in.left;
    fq_status found[SIDES];

    if (in.left > IN_NBYTES_MAX)
        return -1;
    if (!in_room.start) {
        in_room = new_arena(IN_NBYTES_MAX);
        out_room = new_arena(OUT_NBYTES_MAX);
        encoder = ZSTD_createCCtx();
        decoder = ZSTD_createDCtx();
        CHECK(encoder && decoder && !ZSTD_isError(ZSTD_DCtx_setParameter(decoder, ZSTD_d_windowLogMax, WINDOW_BITS_MAX)));
    }
    if (what >> 7)
        in_nbytes = make_stream(&in, what, stream, IN_NBYTES_MAX);
    else if (in_nbytes > 0)
        memcpy(stream, in.at, in_nbytes);
    for (side side = BEFORE; side < SIDES; side++) {
        uint8_t *from = guarded_at(&in_room, side, in_nbytes), *to = guarded_at(&out_room, side, out_nbytes);

        memcpy(from, stream, in_nbytes);
        memset(to, 0xaa, out_nbytes);
        found[side] = fq_inflate(FQ_CODEC_ZSTD, from, in_nbytes, to, out_nbytes);
        CHECK(memcmp(from, stream, in_nbytes) == 0);
        memcpy(out[side], to, out_nbytes);
    }
    CHECK(found[BEFORE] == found[BEHIND]);
    CHECK(found[BEFORE] == FQ_OK || found[BEFORE] == FQ_ERR_ZSTD || found[BEFORE] == FQ_ERR_INFLATED_SHORT ||
          found[BEFORE] == FQ_ERR_INFLATED_LONG);
    CHECK((found[BEFORE] == FQ_OK) == inflate_as_qemu(stream, in_nbytes, expected, out_nbytes));
    for (side side = BEFORE; side < SIDES; side++)
        CHECK(found[side] != FQ_OK || memcmp(out[side], expected, out_nbytes) == 0);
    return 0;
}
