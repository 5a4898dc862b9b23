package rawterm

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// How long a terminal that takes no output is waited for.
const (
	enterTime = time.Second
	leaveTime = 2 * time.Second
	drawTime  = 2 * time.Second
	// watchTime is that of the watcher, for which nobody waits: what a process prints when it
	// gives up may fill the terminal before.
	watchTime = 10 * time.Second
)

// openOutput opens a terminal once more, so that a write to it does not block: O_NONBLOCK on
// the descriptor itself would affect every process that shares it. -1: that is not possible.
func openOutput(fd int) int {
	again, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1
	}
	return again
}

// Draw prints text if the terminal is raw: otherwise it belongs to somebody else. It reports
// whether all of it was taken, for which it waits 2 s at most.
func (t *Terminal) Draw(text string) bool {
	t.modeMu.Lock()
	defer t.modeMu.Unlock()
	return t.isRaw && t.print(text, drawTime)
}

// print needs modeMu.
func (t *Terminal) print(text string, within time.Duration) bool {
	if t.closed || text == "" {
		return text == ""
	}
	if t.out >= 0 {
		return printOn(t.out, text, within)
	}
	return printOn(t.fd, text, within)
}

// printOn prints text within a time, and reports whether all of it was taken.
func printOn(fd int, text string, within time.Duration) bool {
	for end := time.Now().Add(within); text != ""; {
		left := time.Until(end)
		if left <= 0 {
			return false
		}
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(ready, int(left.Milliseconds())+1)
		if n == 0 || err == unix.EINTR {
			continue
		}
		if err != nil || ready[0].Revents&unix.POLLOUT == 0 {
			return false // the terminal has gone
		}
		// A descriptor that blocks has a little room only.
		n, err = unix.Write(fd, []byte(text[:min(len(text), 256)]))
		if err != nil && err != unix.EAGAIN && err != unix.EINTR {
			return false
		}
		text = text[max(n, 0):]
	}
	return true
}
