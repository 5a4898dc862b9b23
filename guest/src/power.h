/* Power off and reset. */
#ifndef POWER_H
#define POWER_H

__attribute__((noreturn)) void power_off(void);
__attribute__((noreturn)) void reboot(void);

#endif
