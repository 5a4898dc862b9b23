package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// threadCall is a system call that each thread makes for itself. Its layout is known to
// threads_amd64.s.
type threadCall struct {
	number, a, b, c uintptr
	errno           uintptr // of a thread on which it failed; 0: it failed on none
}

func prctl(option, value uintptr) threadCall {
	return threadCall{number: unix.SYS_PRCTL, a: option, b: value}
}

const (
	// mostThreads is how many threads can be reached; threads_amd64.s has the number too.
	mostThreads = 4096
	// threadSignal is one that nobody else uses, and that Go blocks on no thread: for os/signal
	// it has one that takes most signals, and blocks the others (runtime/sigtab_linux_generic.go).
	threadSignal = 34
	// threadPatience is how long a thread may take to answer. It answers at once, unless it
	// is not scheduled.
	threadPatience = 30 * time.Second
)

// What the handler of threadSignal uses.
var (
	threadMu sync.Mutex // held while it may run

	threadCalls [72]threadCall
	//lint:ignore U1000 by onThread
	threadCallCount uintptr
	threadsDone     uint32
	threadsDoneIDs  [mostThreads]uint32
)

//lint:ignore U1000 by onThreadPC
func onThread()
func onThreadPC() uintptr

//lint:ignore U1000 by afterThreadPC
func afterThread()
func afterThreadPC() uintptr

// action is the kernel's struct sigaction.
type action struct {
	handler, flags, restorer uintptr
	mask                     uint64
}

func sigaction(signal syscall.Signal, next, last *action) error {
	_, _, errno := syscall.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(signal), uintptr(unsafe.Pointer(next)), uintptr(unsafe.Pointer(last)), 8, 0, 0)
	if errno != 0 {
		return fmt.Errorf("sigaction %d: %w", int(signal), errno)
	}
	return nil
}

// eachThread makes the calls, in order, on every thread of the process and on those that
// are started meanwhile, and notes in each call whether it failed. One signal for a thread is enough
// for all of them; syscall.AllThreadsSyscall stops all threads for each call, for about
// 0.1 ms. Pointers among the arguments must be of variables of the package.
func eachThread(calls []threadCall) error {
	if _, err := threads(); err != nil || len(calls) > len(threadCalls) {
		return eachThreadByPSX(calls)
	}
	threadMu.Lock()
	defer threadMu.Unlock()
	clear(threadsDoneIDs[:min(mostThreads, atomic.LoadUint32(&threadsDone))])
	atomic.StoreUint32(&threadsDone, 0)
	threadCallCount = uintptr(copy(threadCalls[:], calls))
	const onStack, restart, restorer = 0x08000000, 0x10000000, 0x04000000
	var last action
	if err := sigaction(threadSignal, &action{onThreadPC(), onStack | restart | restorer, afterThreadPC(), ^uint64(0)}, &last); err != nil {
		return err
	}
	err := signalThreads()
	copy(calls, threadCalls[:])
	return errors.Join(err, sigaction(threadSignal, &last, nil))
}

// signalThreads signals every thread, until there is none that has not answered. A thread
// that is started by one that has answered needs no signal of its own, but may get one. One
// that was started before is in a list that is read after the answer, since no thread handles
// a signal while it starts another one: so two lists in a row must have answered.
func signalThreads() error {
	signalled, deadline := map[int]bool{}, time.Now().Add(threadPatience)
	for turn, answered := 0, false; ; turn++ {
		list, err := threads()
		if err != nil {
			return err
		}
		all := true
		for _, id := range list {
			if !signalled[id] {
				all, signalled[id] = false, true
				if err := unix.Tgkill(unix.Getpid(), id, threadSignal); err != nil && !errors.Is(err, unix.ESRCH) {
					return fmt.Errorf("signal thread %d: %w", id, err)
				}
			}
		}
		silent := unanswered(list)
		if silent == 0 && all && answered {
			return nil
		}
		answered = silent == 0
		if silent != 0 && time.Now().After(deadline) {
			return fmt.Errorf("thread %d has not answered a signal for %v", silent, threadPatience)
		}
		if silent != 0 && turn > 20 {
			time.Sleep(20 * time.Microsecond)
		} else if silent != 0 {
			runtime.Gosched()
			_, _, _ = syscall.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		}
	}
}

// threads lists the threads of the process.
func threads() (list []int, err error) {
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil, fmt.Errorf("list the threads: %w", err)
	}
	for _, e := range entries {
		id, err := strconv.Atoi(e.Name())
		if err != nil {
			return nil, fmt.Errorf("list the threads: %w", err)
		}
		list = append(list, id)
	}
	return list, nil
}

// unanswered returns one of the threads that has not made the calls; 0: there is none.
func unanswered(list []int) int {
	done := map[int]bool{}
	for i := range min(mostThreads, atomic.LoadUint32(&threadsDone)) {
		done[int(atomic.LoadUint32(&threadsDoneIDs[i]))] = true
	}
	for _, id := range list {
		if !done[id] {
			return id
		}
	}
	return 0
}

// eachThreadByPSX is eachThread where /proc cannot be read.
func eachThreadByPSX(calls []threadCall) error {
	for i := range calls {
		c := &calls[i]
		_, _, errno := psx.Syscall6(c.number, c.a, c.b, c.c, 0, 0, 0)
		c.errno = uintptr(errno)
	}
	return nil
}
