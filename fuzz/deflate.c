/*
 * deflate.c - the inflaters of deflate streams: within their buffers, and of one opinion
 *
 * The input is the length of a cluster less one, in two bytes, and a stream. libz is the control. What inflates as fast as can be
 * has to agree with it in verdict and bytes on every input; our own inflater alone, which takes less, on whatever it takes. libz
 * and libdeflate are not instrumented; our own inflater is, and it leads the fuzzer to new streams.
 */
#include "fuzz.h"

enum { OUT_NBYTES_MAX = 1 << 16, IN_NBYTES_MAX = 1 << 17, OWN = FQ_CODEC_COUNT };

static arena in_room, out_room;

static fq_status inflate(int codec, const uint8_t *in, size_t in_nbytes, uint8_t *out, size_t out_nbytes)
{
#ifdef FQ_HAVE_LIBDEFLATE
    static fq_deflate *own;

    if (codec == OWN) {
        if (!own)
            CHECK((own = fq_deflate_new()));
        return fq_deflate_run(own, in, in_nbytes, out, out_nbytes) ? FQ_OK : FQ_ERR_DEFLATE;
    }
#endif
    return fq_inflate(codec == OWN ? FQ_CODEC_DEFLATE : (fq_codec)codec, in, in_nbytes, out, out_nbytes);
}

/* The verdict of one codec, and the bytes; the same on whichever side the guard pages lie. */
static fq_status inflate_between_guards(int codec, const uint8_t *stream, size_t nbytes, uint8_t *out, size_t out_nbytes)
{
    fq_status found[SIDES];

    for (side side = BEFORE; side < SIDES; side++) {
        uint8_t *in = guarded_at(&in_room, side, nbytes), *to = guarded_at(&out_room, side, out_nbytes);

        memcpy(in, stream, nbytes);
        memset(to, 0xaa, out_nbytes);
        found[side] = inflate(codec, in, nbytes, to, out_nbytes);
        CHECK(memcmp(in, stream, nbytes) == 0);
        CHECK(side == BEFORE || found[side] != FQ_OK || memcmp(out, to, out_nbytes) == 0);
        memcpy(out, to, out_nbytes);
    }
    CHECK(found[BEFORE] == found[BEHIND]);
    return found[BEFORE];
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    static uint8_t fast_out[OUT_NBYTES_MAX], own_out[OUT_NBYTES_MAX], libz_out[OUT_NBYTES_MAX];
    input in = {data, nbytes};
    const size_t out_nbytes = (size_t)take_number(&in, 2) + 1;
    fq_status fast, own, libz;

    if (in.left > IN_NBYTES_MAX)
        return -1;
    if (!in_room.start) {
        in_room = new_arena(IN_NBYTES_MAX);
        out_room = new_arena(OUT_NBYTES_MAX);
    }
    libz = inflate_between_guards(FQ_CODEC_DEFLATE_LIBZ, in.at, in.left, libz_out, out_nbytes);
    CHECK(libz == FQ_OK || libz == FQ_ERR_DEFLATE || libz == FQ_ERR_INFLATED_SHORT);
    fast = inflate_between_guards(FQ_CODEC_DEFLATE, in.at, in.left, fast_out, out_nbytes);
    CHECK(fast == libz);
    CHECK(fast != FQ_OK || memcmp(fast_out, libz_out, out_nbytes) == 0);
    own = inflate_between_guards(OWN, in.at, in.left, own_out, out_nbytes);
    CHECK(own != FQ_OK || (libz == FQ_OK && memcmp(own_out, libz_out, out_nbytes) == 0));
    return 0;
}
