package sandbox

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// notification is struct seccomp_notif.
type notification struct {
	id   uint64
	pid  uint32
	_    uint32
	call int32
	arch uint32
	ip   uint64
	args [6]uint64
}

// answer is struct seccomp_notif_resp.
type answer struct {
	id    uint64
	value int64
	err   int32
	flags uint32
}

const (
	notifyReceive = 0xc0502100 // SECCOMP_IOCTL_NOTIF_RECV
	notifySend    = 0xc0182101 // SECCOMP_IOCTL_NOTIF_SEND
)

// listen has what is not allowed reported by a goroutine, which lets it through.
func (p Policy) listen() error {
	program, err := assemble(p.rules(), unix.SECCOMP_RET_USER_NOTIF)
	if err != nil {
		return err
	}
	fd, err := install(program, unix.SECCOMP_FILTER_FLAG_TSYNC|unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH)
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("mode %s needs Linux 5.7: %w", Log, err)
	}
	if err != nil {
		return err
	}
	go p.report(fd)
	return nil
}

// report answers what the kernel asks, until the process ends. It must not make a call
// that is reported.
func (p Policy) report(fd int) {
	told := make(map[string]bool)
	for {
		var n notification
		if _, _, errno := syscall.Syscall(unix.SYS_IOCTL, uintptr(fd), notifyReceive, uintptr(unsafe.Pointer(&n))); errno != 0 {
			if errno == unix.EINTR || errno == unix.ENOENT { // the thread was interrupted
				continue
			}
			return // ENOSYS is then the answer to all
		}
		a := answer{id: n.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		_, _, _ = syscall.Syscall(unix.SYS_IOCTL, uintptr(fd), notifySend, uintptr(unsafe.Pointer(&a)))
		if line := p.describe(&n); !told[line] && len(told) < maxTold {
			told[line] = true
			p.Report(line)
		}
	}
}

// maxTold is how many kinds of calls are reported.
const maxTold = 200

// describe names the call, and those arguments that rules look at.
func (p Policy) describe(n *notification) string {
	name := fmt.Sprintf("number %d", n.call)
	if n.call >= 0 && n.call < numbers && names[n.call] != "" {
		name = names[n.call]
	}
	for _, r := range p.rules() {
		if r.call != name || r.any == nil {
			continue
		}
		for _, c := range r.any[0] {
			name += fmt.Sprintf(" argument %d=%#x", c.arg, n.args[c.arg])
		}
	}
	return name
}
