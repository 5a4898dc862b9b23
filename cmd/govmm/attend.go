package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/govmm/govmm/internal/fdpass"
	"github.com/govmm/govmm/vmm/serial"
	"golang.org/x/sys/unix"
)

// An attendant is a process whose guest has gone on in another one, and that stays since
// somebody waits for it: a shell, a supervisor, a script. It has freed the guest. It relays
// the terminal, passes signals on, and ends as the other process ends. At the next upgrade
// it stays the same, and the socket to it is passed on.

// statusError ends this process with a status that another one had. That one has said why.
type statusError struct{ status int }

func (e *statusError) Error() string { return "" }

// keptLine is a backend that stays open when the guest has gone on elsewhere.
type keptLine struct {
	serial.Backend
	kept  atomic.Bool
	first sync.Once     // output
	line  *progressLine // on the same terminal
}

// Write implements [serial.Backend]. What the guest prints is not drawn over.
func (k *keptLine) Write(b []byte) (int, error) {
	k.first.Do(k.line.leave)
	return k.Backend.Write(b)
}

// Close implements [serial.Backend]. Calls that are under way end.
func (k *keptLine) Close() error {
	if y, ok := k.Backend.(serial.Yielder); ok && k.kept.Load() {
		y.Yield()
		return nil
	}
	return k.Backend.Close()
}

// attend stays with the process that has taken the guest over. quit ends when the key that
// ends the VM is pressed.
func (p *process) attend(quit context.Context, s *successor) error {
	ctx, over := context.WithCancel(context.Background())
	var relays sync.WaitGroup
	for _, l := range p.kept {
		if s.relay != nil {
			relays.Go(func() { relayLine(ctx, l.Backend, s.relay) })
			break // there is one stdio
		}
	}
	s.word.close()
	debug.FreeOSMemory()
	err := p.awaitHeir(quit, s)
	over()
	relays.Wait()
	for _, l := range p.kept {
		_ = l.Backend.Close() // it restores the terminal
	}
	return err
}

// awaitHeir passes signals on until the process has ended.
func (p *process) awaitHeir(quit context.Context, s *successor) error {
	key := quit.Done()
	for {
		select {
		case sig := <-p.signals:
			if n, ok := sig.(syscall.Signal); ok {
				_ = s.conn.Send(msgSignal, signalMsg{int(n)}) // ended tells if it is gone
			}
		case <-key:
			key = nil
			_ = s.conn.Send(msgQuit, nil)
		case <-s.ended:
			select {
			case status := <-s.exited:
				if status == 0 {
					return nil
				}
				return &statusError{status}
			default:
				return fmt.Errorf("%s: the process that went on with it ended without a word (it was killed?)", p.claim.Name())
			}
		}
	}
}

// relayTime is how long the last output may take to be written.
const relayTime = time.Second

// relayLine moves bytes between a backend and the process that has the guest, until that one
// closes its end or ctx ends.
func relayLine(ctx context.Context, b serial.Backend, stream *os.File) {
	conn, err := net.FileConn(stream)
	_ = stream.Close()
	if err != nil {
		return
	}
	defer conn.Close()
	in, stop := context.WithCancel(ctx)
	defer stop()
	var input sync.WaitGroup
	input.Go(func() {
		buf := make([]byte, 4096)
		for {
			n, err := b.ReadInput(in, buf)
			if n > 0 {
				if _, err := conn.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				if in.Err() == nil {
					_ = conn.(*net.UnixConn).CloseWrite() // the end of the input
				}
				return
			}
		}
	})
	unhook := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Now().Add(relayTime)) })
	defer unhook()
	_, _ = io.Copy(writer{b}, reader{conn}) // by small buffers
	stop()
	_ = conn.SetWriteDeadline(time.Unix(1, 0))
	input.Wait()
}

// reader and writer hide other methods of what they are, so that io.Copy makes a small
// buffer.
type (
	reader struct{ io.Reader }
	writer struct{ io.Writer }
)

func dupFD(f *os.File) (int, error) {
	n, err := fdpass.Number(f)
	if err != nil {
		return -1, err
	}
	return unix.FcntlInt(uintptr(n), unix.F_DUPFD_CLOEXEC, 0)
}
