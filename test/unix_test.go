package test

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
	"golang.org/x/sys/unix"
)

// TestUnixMigration: a guest moves by a unix socket, whose file is for its owner alone,
// takes the place of one that a killed process left, and vanishes with its receiver.
func TestUnixMigration(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	const owned = 16 * mib / mempage.Size
	h.startDemo("u0", 1, 64, 16, 4)
	path := filepath.Join(h.dir, "in.sock")
	killed, addr := h.receiveUnix("killed", path)
	if addr != "unix:"+path {
		t.Errorf("listening on %s, expected %s", addr, path)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != os.ModeSocket|0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if _, errs, exit := h.run("receive", "other", "--listen", addr); exit != 1 || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, "listens there") {
		t.Errorf("a second receiver: exit %d, %q", exit, errs)
	}
	killed.kill(syscall.SIGKILL)
	<-killed.done
	there, _ := h.receiveUnix("u1", path)
	// A relative path is relative to the command, and not to the VM's process.
	cmd := h.command("migrate", "u0", "--to", "unix:in.sock", "--verify-pages")
	cmd.Dir = h.dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	awaitVerified(t, there.out, 0, owned)
	if at := there.err.awaitText(t, 0, "the guest runs here now"); !strings.Contains(there.err.snapshot()[at], "peer=unix:pid=") {
		t.Errorf("the peer has no name: %s", there.err.snapshot()[at])
	}
	// By TLS too: then the name comes from --tls-server-name.
	ours := newAuthority(t)
	back, addr := h.receiveUnix("u2", filepath.Join(h.dir, "back.sock"), "--tls-dir", ours.host("beta"))
	if r, exit := h.migrate("u1", "--to", addr, "--tls-dir", ours.host("alpha"), "--tls-server-name", "beta"); exit != 0 {
		t.Fatalf("by TLS: %+v", r)
	}
	awaitVerified(t, back.out, 0, owned)
	if there.wait() != 0 {
		t.Errorf("the source exits %d", there.exit)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left behind: %v", err)
	}
	r, exit := h.migrate("u2", "--to", "unix:"+path)
	if exit < 3 || !strings.Contains(r.Error, "connect to unix:"+path+": connect: no such file") {
		t.Errorf("nobody listens: exit %d, %+v", exit, r)
	}
}

// receiveUnix is receive at a unix socket.
func (h *host) receiveUnix(name, path string, args ...string) (*proc, string) {
	h.t.Helper()
	p := h.start(append([]string{"receive", name, "--listen", "unix:" + path}, args...)...)
	at := p.err.awaitText(h.t, 0, "listening on ")
	_, addr, _ := strings.Cut(p.err.snapshot()[at], "listening on ")
	return p, strings.TrimSpace(addr)
}

// strangerRole makes the test binary a process of another user.
const strangerRole = "GOVMM_TEST_STRANGER" // listen PATH, or connect PATH

// stranger is the user of that process.
const stranger = 65534

func strangerMain(role string) error {
	if err := syscall.Setgid(stranger); err != nil {
		return err
	}
	if err := syscall.Setuid(stranger); err != nil {
		return err
	}
	what, path, _ := strings.Cut(role, " ")
	if what == "connect" {
		c, err := net.Dial("unix", path)
		if err != nil {
			return err
		}
		defer c.Close()
		b, err := io.ReadAll(c)
		_, _ = fmt.Printf("%d bytes, %v\n", len(b), err)
		return nil
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	if err := os.Chmod(path, 0o666); err != nil { // root may have no capability left in its sandbox
		return err
	}
	_, _ = fmt.Println("listening")
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		b, _ := io.ReadAll(c) // its end is all that is waited for
		c.Close()
		_, _ = fmt.Printf("%d bytes\n", len(b))
	}
}

// startStranger runs strangerMain until the test ends.
func startStranger(t testing.TB, role string) *lines {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), strangerRole+"="+role)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	l := newLines()
	read := make(chan struct{})
	go func() {
		l.from(out)
		close(read)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-read
		_ = cmd.Wait() // it was killed
	})
	return l
}

// TestUnixStrangers: another user's process at the other end of a unix socket is refused
// by either side, also where the file system lets it connect.
func TestUnixStrangers(t *testing.T) {
	needKVM(t)
	needRoot(t)
	h := newHost(t)
	if err := os.Chmod(h.dir, 0o777); err != nil { // govmm's own directory is inside it
		t.Fatal(err)
	}
	path := filepath.Join(h.dir, "in.sock")
	dst, addr := h.receiveUnix("dst", path)
	if err := unix.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	said := startStranger(t, "connect "+path)
	dst.err.awaitText(t, 0, fmt.Sprintf("found user %d", stranger))
	said.awaitText(t, 0, " bytes, ")
	h.startDemo("src", 1, 64, 16, 4)
	fake := filepath.Join(h.dir, "fake.sock")
	listens := startStranger(t, "listen "+fake)
	listens.awaitText(t, 0, "listening")
	r, exit := h.migrate("src", "--to", "unix:"+fake)
	if exit < 3 || !strings.Contains(r.Error, fmt.Sprintf("found user %d", stranger)) || strings.Contains(r.Error, "\n") {
		t.Errorf("a stranger that listens: exit %d, %+v", exit, r)
	}
	listens.awaitText(t, 0, "0 bytes")
	if r, exit := h.migrate("src", "--to", addr); exit != 0 {
		t.Fatalf("%+v", r)
	}
	awaitVerified(t, dst.out, 0, 16*mib/mempage.Size)
}

// TestUnixAsUser: a receiver that gives up root listens on a socket of its user, which
// vanishes too, and reads its certificates as that user.
func TestUnixAsUser(t *testing.T) {
	needKVM(t)
	needRoot(t)
	h := newHost(t)
	ours := newAuthority(t)
	beta := filepath.Join(h.dir, "beta")
	if err := ours.ca.Issue(beta, []string{"beta"}, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	user := []string{"--user", fmt.Sprint(stranger)}
	path := filepath.Join(h.dir, "in.sock")
	own := func(paths ...string) {
		t.Helper()
		for _, p := range paths {
			if err := os.Chown(p, stranger, stranger); err != nil {
				t.Fatal(err)
			}
		}
	}
	own(h.dir, beta)
	if _, errs, exit := h.run(append([]string{"receive", "--listen", "unix:" + path, "--tls-dir", beta}, user...)...); exit != 1 ||
		!strings.Contains(errs, "key.pem: permission denied") || strings.Count(errs, "\n") != 1 {
		t.Errorf("a key of root's: exit %d, %q", exit, errs)
	}
	own(filepath.Join(beta, "key.pem"))
	dst, addr := h.receiveUnix("dst", path, append([]string{"--tls-dir", beta}, user...)...)
	h.startDemo("src", 1, 64, 16, 4, user...)
	copyFiles(t, beta, ours.host("beta"))                                                  // over the same files, which stay the user's
	api := func(name string) string { return filepath.Join(h.dir, "govmm", name+".sock") } // another user's names are not listed
	if r, exit := h.migrate("--api-socket", api("src"), "--to", addr, "--tls-dir", ours.host("alpha"), "--tls-server-name", "beta"); exit != 0 {
		t.Fatalf("%+v", r)
	}
	dst.err.awaitText(t, 0, "changed are in use")
	awaitVerified(t, dst.out, 0, 16*mib/mempage.Size)
	h.must("stop", "--api-socket", api("dst"), "--force")
	if dst.wait() != 0 {
		t.Errorf("exit %d", dst.exit)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left behind: %v", err)
	}
}
