/* The words that the command line and the console take. */
#ifndef WORDS_H
#define WORDS_H

#include "guest.h"

extern u64 tick_every; /* TSC cycles; 0: no ticks */
void words_run(const char *text);
void words_typed(char c);

/* Shared with devicewords.c. A reader changes nothing if it returns false; refuse prints a line and is always false. */
bool refuse(const char *word, u32 length, const char *why);
bool read_size(const char *text, u32 length, u64 *pages);
bool read_plain(const char *text, u32 length, u64 *n);
const char *value_of(const char *word, u32 length, const char *name, u32 *value_length); /* of name=value; or 0 */
bool is_word(const char *word, u32 length, const char *name);
extern const char bad_size[], bad_number[];

/* Does what the word says at once; false if it is not one of these (known says) or was refused. */
bool device_word(const char *word, u32 length, bool *known);

#endif
