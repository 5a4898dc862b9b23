/* Power off and reset without ACPI tables, by the usual ports of virtual machines. */
#include "power.h"
#include "serial.h"

#define PM1A_CNT 0x604       /* address of the ACPI registers in govmm, and in QEMU as its firmware sets it for PIIX4 and ICH9 */
#define SLP_EN (1 << 13)     /* sleep; SLP_TYP, bits 10 to 12, is 0 for S5 on these */
#define RESET_CONTROL 0xcf9  /* PIIX and ICH; bit 1: hard, bit 2: go, bit 3: power cycle */
#define KEYBOARD 0x64
#define PULSE_RESET 0xfe

/* An emulator may stop the CPUs some time after the write. */
static void wait_for_the_end(void)
{
	for (int i = 0; i < 50; i++)
		clock_delay_10ms();
}

static void say(const char *text)
{
	struct line l = {0};
	put(&l, text);
	serial_line(&l);
	serial_flush();
}

void power_off(void)
{
	say("power off");
	outw(PM1A_CNT, SLP_EN);
	wait_for_the_end();
	say("no power switch at port 0x604: triple fault");
	for (;;)
		service(SERVICE_TRIPLE_FAULT, 0);
}

void reboot(void)
{
	say("reboot");
	outb(RESET_CONTROL, 0x06);
	outb(RESET_CONTROL, 0x0e);
	wait_for_the_end();
	outb(KEYBOARD, PULSE_RESET);
	wait_for_the_end();
	say("no reset at ports 0xcf9 and 0x64: triple fault");
	for (;;)
		service(SERVICE_TRIPLE_FAULT, 0);
}
