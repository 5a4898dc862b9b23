/* The words that the command line and the console take. */
#ifndef WORDS_H
#define WORDS_H

#include "guest.h"

extern u64 tick_every; /* TSC cycles; 0: no ticks */
void words_run(const char *text);
void words_typed(char c);

#endif
