/*
 * The guest never waits to send: lines go into a queue, and between two batches of work the main loop sends four
 * characters if the transmitter is empty. An OUT can take 100 us on a slow VMM, so a tick line interrupts the memory work
 * some twenty times for a short time, and not once for a long time.
 */
#include "serial.h"

#define COM1 0x3f8
#define DATA COM1
#define INTERRUPTS (COM1 + 1)
#define FIFO (COM1 + 2)
#define LINE_CONTROL (COM1 + 3)
#define MODEM_CONTROL (COM1 + 4)
#define LINE_STATUS (COM1 + 5)
#define STATUS_RECEIVED 0x01
#define STATUS_SENT 0x20
#define AT_ONCE 4 /* of the FIFO's 16 */

static char queue[16 * KIB];
static u32 head, tail; /* head: next to send; both wrap */
static u64 dropped;    /* lines that were dropped because the queue was full */

static const char *edit;
static u32 edit_length;

void serial_init(void)
{
	outb(INTERRUPTS, 0);
	outb(LINE_CONTROL, 0x80); /* divisor latch */
	outb(DATA, 1);            /* 115200 baud */
	outb(INTERRUPTS, 0);
	outb(LINE_CONTROL, 0x03);  /* 8n1 */
	outb(FIFO, 0x07);          /* enable and clear both, interrupt at the first byte */
	outb(MODEM_CONTROL, 0x0b); /* DTR, RTS, OUT2; OUT2 enables the interrupt output */
	outb(INTERRUPTS, 0x01);    /* received data */
}

static u32 room(void)
{
	return sizeof queue - (tail - head);
}

static void enqueue(const char *text, u32 length)
{
	for (u32 i = 0; i < length; i++)
		queue[tail++ % sizeof queue] = text[i];
}

void serial_edit(const char *text, u32 length)
{
	edit = text;
	edit_length = length;
}

/* If text is being typed, the line starts on a new line, and the typed text is shown again after it. */
void serial_line(struct line *l)
{
	if (room() < l->length + edit_length + 64) {
		dropped++;
		return;
	}
	if (edit_length)
		enqueue("\r\n", 2);
	if (dropped) {
		struct line note = {0};
		put(&note, "(");
		put_number(&note, dropped);
		put(&note, " lines were dropped: nobody read the console)\r\n");
		if (room() > l->length + edit_length + note.length + 4) {
			enqueue(note.text, note.length);
			dropped = 0;
		}
	}
	enqueue(l->text, l->length);
	enqueue("\r\n", 2);
	enqueue(edit, edit_length);
	l->length = 0;
}

void serial_echo(char c)
{
	if (room())
		enqueue(&c, 1);
}

enum pump serial_pump(void)
{
	if (head == tail)
		return PUMP_EMPTY;
	if (!(inb(LINE_STATUS) & STATUS_SENT))
		return PUMP_BLOCKED;
	for (u32 i = 0; i < AT_ONCE && head != tail; i++)
		outb(DATA, queue[head++ % sizeof queue]);
	return head == tail ? PUMP_EMPTY : PUMP_MORE;
}

int serial_read(void)
{
	u8 status = inb(LINE_STATUS);
	if (status == 0xff || !(status & STATUS_RECEIVED)) /* 0xff: no such port */
		return -1;
	return inb(DATA);
}

static bool wait_sent(void)
{
	for (u32 polls = 0; polls < 100000; polls++)
		if (inb(LINE_STATUS) & STATUS_SENT)
			return true;
	return false;
}

void serial_flush(void)
{
	while (head != tail && wait_sent())
		serial_pump();
	wait_sent();
}

void serial_urgent(const struct line *l)
{
	for (u32 i = 0; i < l->length && wait_sent(); i++)
		outb(DATA, l->text[i]);
}
