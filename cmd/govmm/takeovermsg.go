package main

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"github.com/govmm/govmm/vmm/serial"
	"golang.org/x/sys/unix"
)

// takeOver is the first argument of the process that takes a guest over from another one of
// this host. It has the socket to that one, and what was recorded of its start, as
// descriptors; `govmm upgrade` starts it.
const takeOver = "__take-over"

// takeOverProtocol is the version of the messages below. Two versions of govmm that know the
// same one can take guests over from each other, as far as they know the features in use.
const takeOverProtocol = 1

// Descriptors of the process.
const (
	takeOverSocket = 3 + iota
	takeOverRecord
)

// Messages between the two processes, each with its kind.
const (
	msgHello   = "hello"   // from the new process, first
	msgRefuse  = "refuse"  // from the new process: why it cannot take the guest over
	msgWelcome = "welcome" // to the new process: descriptors that it needs to get ready
	msgReady   = "ready"   // from the new process: it waits for connections
	msgConn    = "conn"    // to the new process: a connection of the migration
	msgSignal  = "signal"  // from the attendant: a signal came
	msgQuit    = "quit"    // from the attendant: the key that ends the VM was pressed
	msgExit    = "exit"    // to the attendant: how the process ends
)

type hello struct {
	Protocol int    `json:"protocol"`
	Version  string `json:"version"`
	PID      int    `json:"pid"`
}

// welcome says which descriptors come with it, in this order.
type welcome struct {
	Socket string `json:"socket"` // the path of the API socket
	// KVM, the word (see [word]), the lock and the listener of the API socket, and stderr come
	// always. Attendant is the socket to the process that the supervisor watches, if it is not
	// the one that says this. Notify is the service manager's socket.
	Attended  bool     `json:"attended"` // some process waits for this one, and passes on signals
	Attendant bool     `json:"attendant"`
	Notify    bool     `json:"notify"`
	Serial    lineKind `json:"serial"`
	Console   lineKind `json:"console"`
}

// lineKind says what of a line is passed.
type lineKind string

const (
	lineAnew  lineKind = ""      // nothing: it is opened anew
	lineUnix  lineKind = "unix"  // the listening socket
	lineStdio lineKind = "stdio" // input and output
)

func (k lineKind) files() int { return map[lineKind]int{lineUnix: 1, lineStdio: 2}[k] }

// lineStates is the state of the lines while the guest stands still: of each one that is
// passed, and whether a connection comes with it.
type lineStates struct {
	Serial  *serial.Parked `json:"serial,omitempty"`
	Console *serial.Parked `json:"console,omitempty"`
}

type signalMsg struct {
	Signal int `json:"signal"`
}

type exitMsg struct {
	Status int `json:"status"`
}

type refuseMsg struct {
	Why string `json:"why"`
}

// word is a word of memory that both processes have. It decides who runs the guest: the new
// process claims it just before, and the old one takes it back if the new one has died
// before that. One of them succeeds, and it stays so.
type word struct {
	file *os.File
	mem  []byte
}

const (
	wordSize    = 4096
	wordOpen    = 0
	wordClaimed = 1
	wordTaken   = 2
)

const wordSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_SEAL

func newWord() (*word, error) {
	fd, err := unix.MemfdCreate("govmm-claim", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "claim")
	if err = unix.Ftruncate(fd, wordSize); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, wordSeals)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make the word that decides who runs the guest: %w", err), f.Close())
	}
	return openWord(f)
}

// openWord maps a word that another process has made. It takes the file over.
func openWord(f *os.File) (*word, error) {
	fd := int(f.Fd())
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	if err == nil && (seals&wordSeals != wordSeals || st.Size != wordSize) {
		err = fmt.Errorf("expected a sealed file of %d bytes, found %d bytes, seals %#x", wordSize, st.Size, seals)
	}
	var mem []byte
	if err == nil {
		mem, err = unix.Mmap(fd, 0, wordSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("map the word that decides who runs the guest: %w", err), f.Close())
	}
	return &word{f, mem}, nil
}

func (w *word) change(to uint32) bool {
	return atomic.CompareAndSwapUint32((*uint32)(unsafe.Pointer(&w.mem[0])), wordOpen, to)
}

// TakeBack implements [migrate.Referee].
func (w *word) TakeBack() bool { return w.change(wordTaken) }

// claim takes the right to run, in the new process.
func (w *word) claim() error {
	if !w.change(wordClaimed) {
		return errors.New("the process before has taken its guest back")
	}
	return nil
}

func (w *word) close() {
	_ = unix.Munmap(w.mem)
	_ = w.file.Close()
}
