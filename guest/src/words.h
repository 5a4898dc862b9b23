/* The words of the command line and the console. */
#ifndef WORDS_H
#define WORDS_H

#include "guest.h"

extern u64 tick_every; /* TSC cycles; 0: no ticks */
void words_run(const char *text);
void words_typed(char c);

/* For devicewords.c too. A read function that returns false changes nothing. refuse prints a line and returns false. */
bool refuse(const char *word, u32 length, const char *why);
bool read_size(const char *text, u32 length, u64 *pages);
bool read_plain(const char *text, u32 length, u64 *n);
const char *value_of(const char *word, u32 length, const char *name, u32 *value_length); /* the value if word is name=value, or 0 */
bool is_word(const char *word, u32 length, const char *name);
extern const char bad_size[], bad_number[];

/* Executes a word for a device or the pool immediately; false: unknown (see known) or refused. */
bool device_word(const char *word, u32 length, bool *known);

#endif
