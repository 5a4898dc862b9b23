package sandbox

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// capabilityName names a capability that may be kept.
func capabilityName(c int) string {
	if c == unix.CAP_NET_ADMIN {
		return "net_admin"
	}
	return fmt.Sprint(c)
}

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
	var err error
	s.Capabilities, err = keepOnly(p.Keep)
	return err
}

// keepOnly leaves each thread those of the capabilities that the process has, and returns
// their names.
func keepOnly(keep []int) ([]string, error) {
	header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := new([2]unix.CapUserData)
	if err := unix.Capget(header, &data[0]); err != nil {
		return nil, fmt.Errorf("capget: %w", err)
	}
	kept, names := [2]uint32{}, []string{}
	for _, c := range keep {
		if data[c/32].Permitted&(1<<(c%32)) != 0 {
			kept[c/32] |= 1 << (c % 32)
			names = append(names, capabilityName(c))
		}
	}
	for i := range data {
		data[i] = unix.CapUserData{Effective: kept[i], Permitted: kept[i]}
	}
	if err := allThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(data)), 0); err != nil {
		return nil, fmt.Errorf("capset: %w", err)
	}
	return names, nil
}

// DropCapabilities takes from the process what [Policy].Keep has left to it, when it is
// needed no more. Outside of the cage it does nothing, nor in a program with cgo: to reach
// all threads of one takes system calls that the cage does not let through.
func DropCapabilities() error {
	s := current.Load()
	if s == nil || len(s.Capabilities) == 0 || withCgo {
		return nil
	}
	names, err := keepOnly(nil)
	if err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	next := *s
	next.Capabilities = names
	current.Store(&next)
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
