/* COM1, a 16550A. Only CPU 0 uses it, except for the report of a CPU that has trapped. */
#ifndef SERIAL_H
#define SERIAL_H

#include "print.h"

void serial_init(void);
void serial_line(struct line *l);      /* queues a line; never waits */
void serial_echo(char c);              /* queues the echo of a typed character */
void serial_edit(const char *text, u32 length); /* the typed text of an unfinished line */
enum pump { PUMP_EMPTY, PUMP_MORE, PUMP_BLOCKED };
enum pump serial_pump(void);           /* sends a few characters */
int serial_read(void);                 /* a character, or -1 */
void serial_flush(void);               /* sends the queue, unless the port stays busy */
void serial_urgent(const struct line *l); /* sends without the queue and waits for the port: for a trap's report */

#endif
