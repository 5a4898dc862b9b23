package serial

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// openPTY makes a pair of pseudo terminals: what a user types goes into the
// master, what a program sees is the slave.
func openPTY(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = slave.Close() })
	return master, slave
}

func mode(t *testing.T, f *os.File) unix.Termios {
	t.Helper()
	m, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *m
}

// checkRaw wants a terminal on which every key goes to the guest at once.
func checkRaw(t *testing.T, f *os.File, before unix.Termios) {
	t.Helper()
	m := mode(t, f)
	if m.Lflag&(unix.ICANON|unix.ECHO|unix.ISIG) != 0 {
		t.Errorf("not raw: local flags %#x", m.Lflag)
	}
	if m.Oflag != before.Oflag {
		t.Errorf("output flags %#x, were %#x", m.Oflag, before.Oflag)
	}
}

func TestTerminal(t *testing.T) {
	master, slave := openPTY(t)
	before := mode(t, slave)
	if before.Lflag&unix.ICANON == 0 {
		t.Fatal("a new terminal is raw")
	}
	helpR, helpW := pipe(t)
	quit := make(chan struct{}, 1)
	b := open(t, "stdio", Options{Stdin: slave, Stdout: slave, Stderr: helpW, Quit: func() { quit <- struct{}{} }})
	if mode(t, slave) != before {
		t.Error("the mode changed before anybody read")
	}
	got := make(chan string, 1)
	failed := make(chan error, 1)
	read := func(ctx context.Context) {
		p := make([]byte, 100)
		n, err := b.ReadInput(ctx, p)
		if err != nil {
			failed <- err
			return
		}
		got <- string(p[:n])
	}
	ctx, cancel := context.WithCancel(context.Background())
	go read(ctx)
	for mode(t, slave).Lflag&unix.ICANON != 0 {
	}
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	checkRaw(t, slave, before)

	// Ctrl-C and a key without newline go to the guest; Ctrl-A keys do not.
	write(t, master, "\x03")
	read(context.Background())
	if s := <-got; s != "\x03" {
		t.Errorf("input %q", s)
	}
	write(t, master, "\x01h")
	go read(context.Background())
	expect(t, helpR, helpText)
	write(t, master, "\x01x")
	<-quit
	write(t, master, "\x01\x01")
	if s := <-got; s != "\x01" {
		t.Errorf("input %q", s)
	}
	write(t, b, "guest\n")
	expect(t, master, "guest\r\n")

	// Restored during a read.
	go read(context.Background())
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	select {
	case s := <-got:
		t.Errorf("input %q after Close", s)
	case <-failed:
	}
	if mode(t, slave) != before {
		t.Error("Close did not restore the terminal's mode")
	}
}

// The other ways out restore the mode too, and reading makes it raw again.
func TestRestoreTerminals(t *testing.T) {
	master, slave := openPTY(t)
	before := mode(t, slave)
	b := open(t, "stdio", Options{Stdin: slave, Stdout: slave})
	for range 2 {
		// Typed in cooked mode, or in raw mode: a line is a line to both.
		write(t, master, "key\r")
		if n, err := b.ReadInput(context.Background(), make([]byte, 100)); n == 0 || err != nil {
			t.Fatal(n, err)
		}
		checkRaw(t, slave, before)
		func() {
			defer func() {
				if r := recover(); r == nil {
					t.Error("no panic")
				}
			}()
			defer RestoreTerminals()
			panic("a vCPU's goroutine")
		}()
		if mode(t, slave) != before {
			t.Error("RestoreTerminals did not restore the mode")
		}
		RestoreTerminals()
	}
}

// A terminal whose user does not read (Ctrl-S) does not keep Close waiting, or
// its mode raw.
func TestTerminalStuck(t *testing.T) {
	master, slave := openPTY(t)
	before := mode(t, slave)
	b := open(t, "stdio", Options{Stdin: slave, Stdout: slave})
	write(t, master, "x\r")
	if _, err := b.ReadInput(context.Background(), make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	u, _ := newUART(t, b)
	fillUntilStuck(t, u)
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if mode(t, slave) != before {
		t.Error("the terminal's mode was not restored")
	}
	if err := u.Close(); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("UART's Close: %v", err)
	}
}

// When the terminal goes away, input ends.
func TestTerminalHangup(t *testing.T) {
	master, slave := openPTY(t)
	b := open(t, "stdio", Options{Stdin: slave, Stdout: slave})
	if err := master.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := b.ReadInput(context.Background(), make([]byte, 1)); err == nil {
		t.Errorf("%d bytes from a terminal that is gone", n)
	}
}
