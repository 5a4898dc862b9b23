package serial

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/internal/unixsock"
	"golang.org/x/sys/unix"
)

func TestOpenBackendRefuses(t *testing.T) {
	dir := t.TempDir()
	plain := filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, spec := range []string{"", "tcp:1", "file:", "unix:", "null:", "stdio:x", "file:" + dir, "file:" + dir + "/a/b",
		"unix:" + dir + "/a/b", "unix:" + plain} {
		b, err := OpenBackend(spec, Options{})
		if err == nil {
			t.Errorf("%q was opened: %v", spec, b.Close())
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", spec, err)
		}
	}
	if _, err := os.Stat(plain); err != nil {
		t.Errorf("a file that is no socket was removed: %v", err)
	}
}

func open(t *testing.T, spec string, opt Options) Backend {
	t.Helper()
	b, err := OpenBackend(spec, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return b
}

func write(t *testing.T, w io.Writer, s string) {
	t.Helper()
	if n, err := io.WriteString(w, s); n != len(s) || err != nil {
		t.Fatalf("write of %q: %d, %v", s, n, err)
	}
}

// expect reads as many bytes as want has.
func expect(t *testing.T, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got[:n], err, want)
	}
}

// expectInput reads as many bytes from a backend as want has.
func expectInput(t *testing.T, b Input, want string) {
	t.Helper()
	var got []byte
	for len(got) < len(want) {
		buf := make([]byte, len(want)-len(got))
		n, err := b.ReadInput(context.Background(), buf)
		if err != nil {
			t.Fatalf("input %q, then %v; want %q", got, err, want)
		}
		got = append(got, buf[:n]...)
	}
	if string(got) != want {
		t.Fatalf("input %q, want %q", got, want)
	}
}

func TestNullAndFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for _, spec := range []string{"null", "file:" + path, "file:" + path} {
		b := open(t, spec, Options{})
		write(t, b, "line\n")
		if n, err := b.ReadInput(context.Background(), make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("%s: input %d, %v", spec, n, err)
		}
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "line\nline\n" {
		t.Errorf("the file holds %q, %v", got, err)
	}
}

func dial(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn.(*net.UnixConn)
}

func TestUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "serial")
	b := open(t, "unix:"+path, Options{})
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if _, err := OpenBackend("unix:"+path, Options{}); !errors.Is(err, unixsock.ErrInUse) {
		t.Errorf("a second listener: %v", err)
	}

	// What came before the first client is kept, the last of it.
	write(t, b, "lost"+strings.Repeat("k", maxBacklog))
	first := dial(t, path)
	expect(t, first, strings.Repeat("k", maxBacklog))
	write(t, b, "hello\n")
	expect(t, first, "hello\n")
	write(t, first, "typed")
	expectInput(t, b, "typed")

	// A second client gets a message.
	second := dial(t, path)
	if got, err := io.ReadAll(second); err != nil || !strings.Contains(string(got), "another client") {
		t.Errorf("the second client got %q, %v", got, err)
	}

	// A client that has nothing more to say still listens.
	if err := first.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() {
		_, err := b.ReadInput(ctx, make([]byte, 1))
		result <- err
	}()
	write(t, b, "still\n")
	expect(t, first, "still\n")
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("ReadInput ended with %v", err)
	}

	// It goes; the next gets what is said from then on, without anybody
	// having read or written in between.
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	third := dial(t, path)
	write(t, third, "third")
	expectInput(t, b, "third")
	write(t, b, "for the third\n")
	expect(t, third, "for the third\n")
	if err := third.Close(); err != nil {
		t.Fatal(err)
	}
	write(t, b, "kept\n")
	expect(t, dial(t, path), "kept\n")

	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("the socket is still there after Close")
	}
	if _, err := b.Write([]byte("x")); err == nil {
		t.Error("Write after Close succeeded")
	}
	if _, err := b.ReadInput(context.Background(), make([]byte, 1)); err != io.EOF {
		t.Errorf("ReadInput after Close: %v", err)
	}
}

// A socket that no process listens on is replaced.
func TestUnixStale(t *testing.T) {
	path := filepath.Join(t.TempDir(), "serial")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	b := open(t, "unix:"+path, Options{})
	write(t, b, "new\n")
	expect(t, dial(t, path), "new\n")
}

// A client that does not read makes the port busy, no more; Close ends it.
func TestUnixStuckClient(t *testing.T) {
	path := filepath.Join(t.TempDir(), "serial")
	b := open(t, "unix:"+path, Options{})
	dial(t, path)
	u, _ := newUART(t, b)
	fillUntilStuck(t, u)
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if err := u.Close(); err == nil {
		t.Error("no error after output was lost")
	}
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close(); _ = w.Close() })
	return r, w
}

func TestStdioPipes(t *testing.T) {
	inR, inW := pipe(t)
	outR, outW := pipe(t)
	b := open(t, "stdio", Options{Stdin: inR, Stdout: outW})
	write(t, b, "out")
	expect(t, outR, "out")
	// Not a terminal: Ctrl-A is a byte like others.
	write(t, inW, "\x01x\x03")
	expectInput(t, b, "\x01x\x03")

	// A read under way ends with its context, and takes nothing with it.
	for range 100 {
		ctx, cancel := context.WithCancel(context.Background())
		go cancel()
		if _, err := b.ReadInput(ctx, make([]byte, 1)); !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
	}
	write(t, inW, "more")
	expectInput(t, b, "more")
	if err := inW.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.ReadInput(context.Background(), make([]byte, 1)); err != io.EOF {
		t.Errorf("after the end of input: %v", err)
	}
	write(t, b, "out goes on")
	expect(t, outR, "out goes on")

	// A stuck reader holds a Write up until Close.
	result := make(chan error, 1)
	go func() {
		_, err := b.Write(make([]byte, 1<<20))
		result <- err
	}()
	expect(t, outR, "\x00")
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-result; !errors.Is(err, os.ErrClosed) {
		t.Errorf("the stuck Write ended with %v", err)
	}
	if _, err := b.ReadInput(context.Background(), make([]byte, 1)); err != io.EOF {
		t.Errorf("ReadInput after Close: %v", err)
	}
	// The pipe itself was left as it was: blocking.
	if flags, err := unix.FcntlInt(outW.Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK != 0 {
		t.Errorf("flags of stdout %#x, %v", flags, err)
	}
}

// Output to a file goes where the file's position is, to a socket without
// blocking for ever.
func TestStdioFileAndSocket(t *testing.T) {
	inR, _ := pipe(t)
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	write(t, f, "before ")
	b := open(t, "stdio", Options{Stdin: inR, Stdout: f})
	write(t, b, strings.Repeat("x", 10000))
	write(t, f, " after")
	if got, err := os.ReadFile(f.Name()); err != nil || string(got) != "before "+strings.Repeat("x", 10000)+" after" {
		t.Errorf("the file holds %d bytes, %v", len(got), err)
	}

	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	near, far := os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
	defer func() { _ = near.Close(); _ = far.Close() }()
	s := open(t, "stdio", Options{Stdin: inR, Stdout: near})
	write(t, s, "socket")
	expect(t, far, "socket")
	result := make(chan error, 1)
	go func() {
		_, err := s.Write(make([]byte, 8<<20))
		result <- err
	}()
	expect(t, far, "\x00")
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-result; !errors.Is(err, os.ErrClosed) {
		t.Errorf("the stuck Write ended with %v", err)
	}
}

func TestEscape(t *testing.T) {
	for _, tt := range []struct{ in, out, commands string }{
		{"abc", "abc", ""},
		{"a\x01xb", "ab", "x"},
		{"\x01\x01", "\x01", ""},
		{"\x01\x01x", "\x01x", ""},
		{"\x01h\x01\x01\x01?z", "\x01z", "h?"},
		{"\x01\x03", "", "\x03"},
	} {
		// However the keys are cut into reads.
		for cut := range len(tt.in) + 1 {
			var e escape
			var out, commands []byte
			for _, part := range []string{tt.in[:cut], tt.in[cut:]} {
				p := []byte(part)
				out = append(out, p[:e.filter(p, func(k byte) { commands = append(commands, k) })]...)
			}
			if !bytes.Equal(out, []byte(tt.out)) || string(commands) != tt.commands {
				t.Errorf("%q cut at %d: %q and commands %q", tt.in, cut, out, commands)
			}
		}
	}
}

// A client that takes no output keeps another one out for a while, but not for ever. What
// it did not take goes to the other one.
func TestUnixStuckClientLosesItsPlace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	b := open(t, "unix:"+path, Options{}).(*unixSocket)
	first := dial(t, path)
	write(t, b, "hello\n")
	expect(t, first, "hello\n")
	written := make(chan error, 1)
	go func() {
		_, err := b.Write(append(bytes.Repeat([]byte("x"), 8<<20), "end"...)) // more than the socket takes
		written <- err
	}()
	for deadline := time.Now().Add(testenv.Patience); !b.current().stuck(time.Millisecond); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the client is not stuck")
		}
	}
	if got, err := io.ReadAll(dial(t, path)); err != nil || !strings.Contains(string(got), "another client") {
		t.Fatalf("the second client got %q, %v", got, err)
	}
	b.patience.Store(0) // the time has passed
	second := dial(t, path)
	got, buf := []byte{}, make([]byte, 64<<10)
	for !bytes.HasSuffix(got, []byte("end")) {
		n, err := second.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, buf[:n]...)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
	write(t, second, "typed")
	expectInput(t, b, "typed")
}
