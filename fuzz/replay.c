/*
 * replay.c - a fuzz target without a fuzzer: replay COPIES FILE... runs it on each file, and on so many changed copies of it
 *
 * The copies are the same every time. What the target ends at is written to the file `replay-failed`.
 */
#include "fuzz.h"

/* Of the sanitizers, where the program is built with them. */
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

enum { CHANGES_MAX = 4, MORE_NBYTES = 64 };

static uint8_t *current;
static size_t current_nbytes;
static const char *current_name;
static uint64_t seed = 1;

static uint64_t pick(uint64_t below)
{
    seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407;
    return below ? (seed >> 16) % below : 0;
}

static void tell(void)
{
    FILE *f = current_name ? fopen("replay-failed", "wb") : NULL;

    if (!f)
        return;
    fwrite(current, 1, current_nbytes, f);
    fclose(f);
    fprintf(stderr, "replay: this was %s, or a copy of it, which is in ./replay-failed\n", current_name);
    current_name = NULL;
}

static void change(uint8_t *at, size_t *nbytes)
{
    const size_t place = (size_t)pick(*nbytes), width = (size_t)1 << pick(4);
    const uint64_t numbers[] = {0, UINT64_MAX, UINT64_C(1) << pick(64), pick(UINT64_MAX), pick(300)};
    const uint64_t number = numbers[pick(sizeof(numbers) / sizeof(*numbers))];
    size_t n;

    switch (pick(*nbytes ? 5 : 1)) {
    case 0: /* more of the same */
        n = (size_t)pick(*nbytes - place < MORE_NBYTES ? *nbytes - place : MORE_NBYTES);
        memmove(at + place + n, at + place, *nbytes - place);
        *nbytes += n;
        break;
    case 1: /* less */
        n = (size_t)pick(*nbytes - place);
        n = pick(4) ? n % MORE_NBYTES : n;
        memmove(at + place, at + place + n, *nbytes - place - n);
        *nbytes -= n;
        break;
    case 2:
        at[place] ^= (uint8_t)(1 << pick(8));
        break;
    default: /* another number, big-endian */
        for (size_t i = 0; i < width && place / width * width + i < *nbytes; i++)
            at[place / width * width + i] = (uint8_t)(number >> 8 * (width - 1 - i));
    }
}

/* In memory of just that length, so that a sanitizer sees one byte too many. */
static void run(const char *name, const uint8_t *bytes, size_t nbytes)
{
    current = malloc(nbytes + !nbytes);
    CHECK(current);
    memcpy(current, bytes, nbytes);
    current_nbytes = nbytes;
    current_name = name;
    LLVMFuzzerTestOneInput(current, nbytes);
    current_name = NULL;
    free(current);
}

static void replay(const char *name, unsigned long copies)
{
    FILE *f = fopen(name, "rb");
    uint8_t *bytes, *copy;
    size_t nbytes;

    CHECK(f && fseek(f, 0, SEEK_END) == 0);
    nbytes = (size_t)ftell(f);
    rewind(f);
    bytes = malloc(nbytes + 1);
    copy = malloc(nbytes + CHANGES_MAX * MORE_NBYTES);
    CHECK(bytes && copy && fread(bytes, 1, nbytes, f) == nbytes);
    fclose(f);
    run(name, bytes, nbytes);
    for (unsigned long i = 0; i < copies; i++) {
        size_t n = nbytes;

        memcpy(copy, bytes, nbytes);
        for (uint64_t changes = 1 + pick(CHANGES_MAX); changes > 0; changes--)
            change(copy, &n);
        run(name, copy, n);
    }
    free(bytes);
    free(copy);
}

int main(int argc, char **argv)
{
    const unsigned long copies = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;

    atexit(tell);
    if (__sanitizer_set_death_callback)
        __sanitizer_set_death_callback(tell);
    for (int i = 2; i < argc; i++)
        replay(argv[i], copies);
    CHECK(argc > 2);
    printf("replay: %d files, and %lu changed copies of each\n", argc - 2, copies);
    return 0;
}
