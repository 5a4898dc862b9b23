/* COM1, a 16550A. Only CPU 0 uses it, but for the last words of a CPU that trapped. */
#ifndef SERIAL_H
#define SERIAL_H

#include "print.h"

void serial_init(void);
void serial_line(struct line *l);      /* queues a line; never waits */
void serial_echo(char c);              /* queues one character of what is being typed */
void serial_edit(const char *text, u32 length); /* what has been typed of an unfinished line */
enum pump { PUMP_EMPTY, PUMP_MORE, PUMP_BLOCKED };
enum pump serial_pump(void);           /* sends a few characters; is there more, does the port take it? */
int serial_read(void);                 /* a character, or -1 */
void serial_flush(void);               /* sends all that is queued, unless nobody takes it */
void serial_urgent(const struct line *l); /* past the queue, waiting for the port: for a trap's report */

#endif
