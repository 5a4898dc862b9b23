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

// DropCapabilities does this part of [Policy.Enter] alone, whatever the mode is.
func (p Policy) DropCapabilities() error { return p.dropCapabilities(new(Status)) }

// dropCapabilities leaves no capability but those to keep, in any set of any thread, and
// no way to get one by starting a program. Only a process with CAP_SETPCAP can empty the
// bounding set; for others no_new_privs has the same effect.
func (p Policy) dropCapabilities(s *Status) error {
	calls := []threadCall{prctl(unix.PR_SET_NO_NEW_PRIVS, 1)}
	for c := uintptr(0); ; c++ {
		in, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // the kernel knows no more
			break
		}
		if err != nil {
			return fmt.Errorf("PR_CAPBSET_READ %d: %w", c, err)
		}
		if in != 0 {
			calls = append(calls, prctl(unix.PR_CAPBSET_DROP, c))
		}
	}
	drop, names, err := keepOnly(p.Keep)
	if err != nil {
		return err
	}
	calls = append(calls, prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL), drop)
	if err := eachThread(calls); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	for _, c := range calls {
		errno := syscall.Errno(c.errno)
		if errno == 0 || c.a == unix.PR_CAPBSET_DROP && errno == unix.EPERM || c.a == unix.PR_CAP_AMBIENT && errno == unix.EINVAL { // Linux 4.3
			continue
		}
		what := "capset"
		if c.number == unix.SYS_PRCTL {
			what = fmt.Sprintf("prctl %d %d", c.a, c.b)
		}
		return fmt.Errorf("drop capabilities: %s: %w", what, errno)
	}
	s.Capabilities = names
	return nil
}

// What capset gets.
var (
	capHeader unix.CapUserHeader
	capData   [2]unix.CapUserData
)

// keepOnly returns the call that leaves a thread those of the capabilities that the process
// has, and their names.
func keepOnly(keep []int) (threadCall, []string, error) {
	capHeader = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capget(&capHeader, &capData[0]); err != nil {
		return threadCall{}, nil, fmt.Errorf("capget: %w", err)
	}
	kept, names := [2]uint32{}, []string{}
	for _, c := range keep {
		if capData[c/32].Permitted&(1<<(c%32)) != 0 {
			kept[c/32] |= 1 << (c % 32)
			names = append(names, capabilityName(c))
		}
	}
	for i := range capData {
		capData[i] = unix.CapUserData{Effective: kept[i], Permitted: kept[i]}
	}
	return threadCall{number: unix.SYS_CAPSET, a: uintptr(unsafe.Pointer(&capHeader)), b: uintptr(unsafe.Pointer(&capData))}, names, nil
}

// DropCapabilities takes from the process what [Policy].Keep has left to it, when it is
// needed no more. Outside of the cage it does nothing, nor in a program with cgo: to reach
// all threads of one takes system calls that the cage does not let through.
func DropCapabilities() error {
	s := current.Load()
	if s == nil || len(s.Capabilities) == 0 || withCgo {
		return nil
	}
	drop, names, err := keepOnly(nil)
	if err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	if _, _, errno := psx.Syscall3(drop.number, drop.a, drop.b, 0); errno != 0 {
		return fmt.Errorf("drop capabilities: capset: %w", errno)
	}
	next := *s
	next.Capabilities = names
	current.Store(&next)
	return nil
}
