/*
 * deflate.c - both inflaters of deflate streams: within their buffers, and of one opinion
 *
 * The input is the length of a cluster less one, in two bytes, and a stream. libz and libdeflate are not instrumented; what leads
 * the fuzzer to new streams is a third inflater, plain and slow (inflater.h), which also tells where the two may differ.
 */
#include "fuzz.h"
#include "inflater.h"

enum { OUT_NBYTES_MAX = 1 << 16, IN_NBYTES_MAX = 1 << 17 };

static arena in_room, out_room;

/* The verdict of one codec, and the bytes; the same on whichever side the guard pages lie. */
static fq_status inflate_between_guards(fq_codec codec, const uint8_t *stream, size_t nbytes, uint8_t *out, size_t out_nbytes)
{
    fq_status found[SIDES];

    for (side side = BEFORE; side < SIDES; side++) {
        uint8_t *in = guarded_at(&in_room, side, nbytes), *to = guarded_at(&out_room, side, out_nbytes);

        memcpy(in, stream, nbytes);
        memset(to, 0xaa, out_nbytes);
        found[side] = fq_inflate(codec, in, nbytes, to, out_nbytes);
        CHECK(memcmp(in, stream, nbytes) == 0);
        CHECK(side == BEFORE || found[side] != FQ_OK || memcmp(out, to, out_nbytes) == 0);
        memcpy(out, to, out_nbytes);
    }
    CHECK(found[BEFORE] == found[BEHIND]);
    return found[BEFORE];
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    static uint8_t fast_out[OUT_NBYTES_MAX], libz_out[OUT_NBYTES_MAX], plain_out[OUT_NBYTES_MAX];
    input in = {data, nbytes};
    const size_t out_nbytes = (size_t)take_number(&in, 2) + 1;
    fq_status fast, libz;
    inflater plain;

    if (in.left > IN_NBYTES_MAX)
        return -1;
    if (!in_room.start) {
        in_room = new_arena(IN_NBYTES_MAX);
        out_room = new_arena(OUT_NBYTES_MAX);
    }
    fast = inflate_between_guards(FQ_CODEC_DEFLATE, in.at, in.left, fast_out, out_nbytes);
    libz = inflate_between_guards(FQ_CODEC_DEFLATE_LIBZ, in.at, in.left, libz_out, out_nbytes);
    CHECK(fast == FQ_OK || fast == FQ_ERR_DEFLATE || fast == FQ_ERR_INFLATED_SHORT);

    plain = inflate_plainly(in.at, in.left, plain_out, out_nbytes, false);
    CHECK((libz == FQ_OK) == plain.good);
    CHECK(libz != FQ_OK || memcmp(libz_out, plain_out, out_nbytes) == 0);
    if (fast == libz) {
        CHECK(fast != FQ_OK || memcmp(fast_out, libz_out, out_nbytes) == 0);
        return 0;
    }
    /* What libdeflate takes and libz does not is what no encoder writes, and of that what is known: see inflater.h. */
    CHECK(fast == FQ_OK && libz == FQ_ERR_DEFLATE);
    plain = inflate_plainly(in.at, in.left, plain_out, out_nbytes, true);
    CHECK(plain.good && plain.deviated && memcmp(fast_out, plain_out, out_nbytes) == 0);
    return 0;
}
