/*
 * testing.h - what must be true in a test, and how often it is tried
 */
#ifndef FASTQCOW_TESTING_H
#define FASTQCOW_TESTING_H

#include <stdio.h>
#include <stdlib.h>

/* TSan is slow, and looks at what threads share: of what one thread does over and over, each 20th time is enough there. */
#ifdef __SANITIZE_THREAD__
enum { EACH = 20 };
#else
enum { EACH = 1 };
#endif

#define CHECK(condition)                                                                                 \
    do {                                                                                                 \
        if (!(condition)) {                                                                              \
            fprintf(stderr, "%s:%d: in %s: %s is not true\n", __FILE__, __LINE__, __func__, #condition); \
            exit(1);                                                                                     \
        }                                                                                                \
    } while (0)

#endif
