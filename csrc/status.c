/*
 * status.c - the sentences of the status codes
 *
 * They stand in fastqcow.h beside the codes, and are given out here so that no other place words an error twice.
 */
#include "fastqcow.h"

const char *fq_status_sentence(fq_status status)
{
    static const char *const sentences[] = {
#define FQ_SENTENCE(name, sentence) sentence,
        FQ_STATUSES(FQ_SENTENCE)
#undef FQ_SENTENCE
    };

    return (unsigned)status < FQ_STATUS_COUNT ? sentences[status] : "an unknown status";
}
