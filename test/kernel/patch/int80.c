/* Where ring 0 is emulated, INT in ring 3 is an invalid instruction. build.sh puts this
 * before the handler of those: INT 0x80 is a system call there as well. */
#include <asm/syscall.h>
#include <asm/unistd.h>

static bool int80_instead(struct pt_regs *regs)
{
	unsigned int nr = regs->ax;
	bool is = false;
	u16 op;

	if (!user_mode(regs))
		return false;
	local_irq_enable();
	if (get_user(op, (u16 __user *)regs->ip) == 0 && op == 0x80cd) {
		is = true;
		regs->ip += sizeof(op);
		regs->orig_ax = nr;
		current_thread_info()->status |= TS_COMPAT;
		regs->ax = nr < IA32_NR_syscalls ? ia32_sys_call(regs, nr) : -ENOSYS;
	}
	local_irq_disable();
	return is;
}

