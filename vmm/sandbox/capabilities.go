package sandbox

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// capabilityNames are the capabilities of linux/capability.h, by number.
var capabilityNames = []string{"chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid",
	"setpcap", "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner",
	"sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice", "sys_resource",
	"sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap", "mac_override", "mac_admin",
	"syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf", "checkpoint_restore"}

// allThreads makes a system call on each thread of the process, as C programs do with
// libcap's psx and others with syscall.AllThreadsSyscall.
func allThreads(call, a, b, c uintptr) error {
	if _, _, errno := psx.Syscall6(call, a, b, c, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// DropCapabilities does this part of [Policy.Enter] alone, whatever the mode is.
func (p Policy) DropCapabilities() error { return p.dropCapabilities(new(Status)) }

// dropCapabilities leaves no capability but those to keep, in any set of any thread, and
// no way to get one by starting a program.
func (p Policy) dropCapabilities(s *Status) error {
	if err := allThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0); err != nil {
		return fmt.Errorf("PR_SET_NO_NEW_PRIVS: %w", err)
	}
	if err := dropBounding(); err != nil {
		return err
	}
	if err := allThreads(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0); err != nil && !errors.Is(err, unix.EINVAL) { // Linux 4.3
		return fmt.Errorf("PR_CAP_AMBIENT_CLEAR_ALL: %w", err)
	}
	header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := new([2]unix.CapUserData)
	if err := unix.Capget(header, &data[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	kept := [2]uint32{}
	for _, c := range p.Keep {
		kept[c/32] |= data[c/32].Permitted & (1 << (c % 32))
	}
	for i := range data {
		data[i] = unix.CapUserData{Effective: kept[i], Permitted: kept[i]}
	}
	header.Pid = 0
	if err := allThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(data)), 0); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	s.Capabilities = []string{}
	for c, name := range capabilityNames {
		if kept[c/32]&(1<<(c%32)) != 0 {
			s.Capabilities = append(s.Capabilities, name)
		}
	}
	return nil
}

// dropBounding empties the bounding set. Only a process with CAP_SETPCAP can; for others
// no_new_privs has the same effect.
func dropBounding() error {
	for c := uintptr(0); ; c++ {
		in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		switch {
		case errors.Is(err, unix.EINVAL): // the kernel knows no more
			return nil
		case err != nil:
			return fmt.Errorf("PR_CAPBSET_READ %d: %w", c, err)
		case in == 0:
			continue
		}
		err = allThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0)
		if errors.Is(err, syscall.EPERM) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("PR_CAPBSET_DROP %d: %w", c, err)
		}
	}
}
