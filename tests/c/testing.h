/*
 * testing.h - what must be true in a test
 */
#ifndef FASTQCOW_TESTING_H
#define FASTQCOW_TESTING_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                                 \
    do {                                                                                                 \
        if (!(condition)) {                                                                              \
            fprintf(stderr, "%s:%d: in %s: %s is not true\n", __FILE__, __LINE__, __func__, #condition); \
            exit(1);                                                                                     \
        }                                                                                                \
    } while (0)

#endif
