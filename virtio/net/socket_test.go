package net_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"log/slog"
	stdnet "net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/virtiotest"
)

// peer is the other end of a socket: it takes one guest at a time.
type peer struct {
	t  testing.TB
	ln *stdnet.UnixListener
	c  *stdnet.UnixConn
}

func newPeer(t testing.TB, path string) *peer {
	t.Helper()
	ln, err := stdnet.ListenUnix("unix", &stdnet.UnixAddr{Name: path, Net: "unix"})
	check(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	return &peer{t: t, ln: ln}
}

func (p *peer) accept() {
	p.t.Helper()
	check(p.t, p.ln.SetDeadline(time.Now().Add(20*time.Second)))
	c, err := p.ln.AcceptUnix()
	check(p.t, err)
	p.t.Cleanup(func() { _ = c.Close() })
	p.c = c
}

// read reads a frame.
func (p *peer) read() []byte {
	p.t.Helper()
	check(p.t, p.c.SetReadDeadline(time.Now().Add(20*time.Second)))
	var n [4]byte
	_, err := io.ReadFull(p.c, n[:])
	check(p.t, err)
	size := binary.BigEndian.Uint32(n[:])
	if size > 70000 {
		p.t.Fatalf("a frame of %d bytes", size)
	}
	b := make([]byte, size)
	_, err = io.ReadFull(p.c, b)
	check(p.t, err)
	return b
}

// write writes frames.
func (p *peer) write(frames ...[]byte) {
	p.t.Helper()
	for _, f := range frames {
		_, err := p.c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(f))), f...))
		check(p.t, err)
	}
}

// openSocket opens a device of a socket.
func openSocket(t testing.TB, words string) (virtio.Backend, *net.Device) {
	t.Helper()
	spec, err := net.Kind.Parse(words)
	check(t, err)
	b, err := spec.Open(slog.New(slog.DiscardHandler))
	check(t, err)
	d, err := b.Attach(virtio.Guest{})
	check(t, err)
	return b, d.(*net.Device)
}

// receive offers room and returns the frame that comes.
func (r *rig) receive() []byte {
	r.t.Helper()
	at := r.data + 1<<20
	r.add(0, nil, []virtiotest.Buffer{{GPA: at, Len: 70 << 10}})
	u := r.next(0)
	return r.bytes(at, uint64(u.Len))[net.HeaderBytes:]
}

// linkIs waits until the guest is told that the link is up or down.
func (r *rig) linkIs(up bool) {
	r.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); (r.status()&1 != 0) != up; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("expected the link to be up: %v", up)
		}
	}
}

func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net.sock")
	p := newPeer(t, path)
	b, d := openSocket(t, "socket="+path)
	if d.Features()&(offloads|net.FeatureMTU) != 0 {
		t.Errorf("features %#x: nobody does these", d.Features())
	}
	check(t, b.(virtio.Locker).Lock())
	p.accept()
	r := newRigOf(t, d, d.Features())
	for _, n := range []int{14, 60, 1514, 65549} {
		want := frame(n)
		r.send(0, want)
		if got := p.read(); !bytes.Equal(got, want[net.HeaderBytes:]) {
			t.Errorf("the peer got %d bytes, expected the frame of %d that was sent", len(got), n)
		}
		p.write(want[net.HeaderBytes:])
		if got := r.receive(); !bytes.Equal(got, want[net.HeaderBytes:]) {
			t.Errorf("the guest got %d bytes, expected the frame of %d that was sent", len(got), n)
		}
	}
	// In pieces, two at once.
	one, two := frame(100)[net.HeaderBytes:], frame(200)[net.HeaderBytes:]
	raw := append(binary.BigEndian.AppendUint32(nil, 100), one...)
	raw = append(binary.BigEndian.AppendUint32(raw, 200), two...)
	for _, at := range [][2]int{{0, 3}, {3, 50}, {50, 106}, {106, len(raw)}} {
		_, err := p.c.Write(raw[at[0]:at[1]])
		check(t, err)
		time.Sleep(5 * time.Millisecond)
	}
	if got := r.receive(); !bytes.Equal(got, one) {
		t.Errorf("got %d bytes, expected the first frame", len(got))
	}
	if got := r.receive(); !bytes.Equal(got, two) {
		t.Errorf("got %d bytes, expected the second frame", len(got))
	}

	// The peer goes away and comes back: it is told whom it has got, at once.
	check(t, p.c.Close())
	r.linkIs(false)
	r.send(0, frame(60))
	p.accept()
	r.linkIs(true)
	if got := p.read(); binary.BigEndian.Uint16(got[12:]) != 0x8035 || !bytes.Equal(got[6:12], guestMAC0(d)) {
		t.Errorf("the first frame to a new peer is % x, expected an announcement", got)
	}
	if r.status()&2 == 0 {
		t.Error("the guest is not asked to announce itself")
	}
	r.send(0, frame(61))
	if got := p.read(); len(got) != 61 {
		t.Errorf("a frame of %d bytes, expected 61", len(got))
	}

	// A peer that breaks the protocol is left.
	for _, length := range []uint32{0, 13, 70000, 1 << 31, 1<<32 - 1} {
		_, err := p.c.Write(binary.BigEndian.AppendUint32(nil, length))
		check(t, err)
		r.linkIs(false)
		p.accept()
		r.linkIs(true)
	}
	check(t, r.d.Pause(ctx(t)))
	check(t, r.d.Resume())
	p.write(frame(77)[net.HeaderBytes:])
	if got := r.receive(); len(got) != 77 {
		t.Errorf("after a pause a frame of %d bytes, expected 77", len(got))
	}
}

func guestMAC0(d *net.Device) []byte { m := d.MAC(); return m[:] }

// TestSocketPeerIsSlow: a peer that takes nothing costs frames, and neither the guest's time
// nor memory. What it gets later are whole frames.
func TestSocketPeerIsSlow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net.sock")
	p := newPeer(t, path)
	b, d := openSocket(t, "socket="+path)
	check(t, b.(virtio.Locker).Lock())
	p.accept()
	r := newRigOf(t, d, d.Features())
	want := frame(60000)
	for range 200 {
		r.send(0, want)
	}
	c := d.Counters()
	if c.TxDropped == 0 || c.TxFrames < 60 || c.TxFrames > 120 {
		t.Errorf("sent %d and dropped %d of 200 frames, expected to keep about 4 MiB", c.TxFrames, c.TxDropped)
	}
	for range c.TxFrames {
		if got := p.read(); !bytes.Equal(got, want[net.HeaderBytes:]) {
			t.Fatalf("a frame of %d bytes, expected the one that was sent", len(got))
		}
	}
	r.send(0, frame(99))
	if got := p.read(); len(got) != 99 {
		t.Errorf("a frame of %d bytes, expected 99", len(got))
	}
}

// TestSocketIsOfOneSide: a destination connects when it has the right to run the guest, after
// the source has disconnected.
func TestSocketIsOfOneSide(t *testing.T) {
	path := filepath.Join(t.TempDir(), "net.sock")
	p := newPeer(t, path)
	a, da := openSocket(t, "socket="+path+",mac=52:54:00:01:02:03")
	check(t, a.(virtio.Locker).Lock())
	p.accept()
	spec, err := net.Kind.Parse("tap=elsewhere,mac=52:54:00:01:02:03")
	check(t, err)
	here, err := net.Kind.ParseHere("socket=" + path)
	check(t, err)
	check(t, spec.(virtio.Mover).Move(here))
	b, err := spec.Open(slog.New(slog.DiscardHandler))
	check(t, err)
	db, err := b.Attach(virtio.Guest{})
	check(t, err)
	check(t, a.(virtio.Locker).Unlock(ctx(t)))
	if _, err := p.c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the source's connection: %v, expected its end", err)
	}
	check(t, b.(virtio.Locker).Lock())
	p.accept()
	r := newRigOf(t, db.(*net.Device), db.(*net.Device).Features())
	r.send(0, frame(60))
	if got := p.read(); len(got) != 60 {
		t.Errorf("a frame of %d bytes, expected 60", len(got))
	}
	// The source takes its guest back although nobody listens: it goes on without a link.
	check(t, p.ln.Close())
	check(t, a.(virtio.Locker).Lock())
	ra := newRigOf(t, da, da.Features())
	ra.linkIs(false)
	ra.send(0, frame(60))
	p = newPeer(t, path)
	p.accept()
	ra.linkIs(true)
}

func TestSocketErrors(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	check(t, os.WriteFile(file, nil, 0o600))
	for path, want := range map[string]string{
		filepath.Join(dir, "none"):          "there is no such socket (start the other end first",
		file:                                "expected a socket",
		"/" + strings.Repeat("x", 120):      "the path has 121 characters, expected fewer than 108",
		filepath.Join(file, "below-a-file"): "not a directory",
	} {
		spec, err := net.Kind.Parse("socket=" + path)
		check(t, err)
		if _, err := spec.Open(slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40s: %v, expected %q", path, err, want)
		}
	}
	// Nobody listens there any more.
	path := filepath.Join(dir, "stale")
	ln, err := stdnet.ListenUnix("unix", &stdnet.UnixAddr{Name: path, Net: "unix"})
	check(t, err)
	ln.SetUnlinkOnClose(false)
	check(t, ln.Close())
	b, d := openSocket(t, "socket="+path)
	if err := b.(virtio.Locker).Lock(); err == nil || !strings.Contains(err.Error(), "net socket="+path+": connect: connection refused") {
		t.Errorf("lock: %v", err)
	}
	check(t, d.Close())
}

// FuzzStream has the other end of a socket write anything, in pieces. The guest gets the
// frames that are whole and valid, in their order, up to the first one that is not.
func FuzzStream(f *testing.F) {
	valid := append(binary.BigEndian.AppendUint32(nil, 60), frame(60)[net.HeaderBytes:]...)
	f.Add(valid, 7)
	f.Add(append(valid[:len(valid):len(valid)], 0, 0, 0, 13, 1, 2), 1)
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0}, 3)
	f.Add([]byte{0, 1, 0, 13}, 1)
	f.Fuzz(func(t *testing.T, in []byte, piece int) {
		path := filepath.Join(t.TempDir(), "n")
		p := newPeer(t, path)
		b, d := openSocket(t, "socket="+path)
		check(t, b.(virtio.Locker).Lock())
		p.accept()
		r := newRigOf(t, d, d.Features())
		piece = min(max(piece, 1), 4096)
		for rest := in; len(rest) > 0; {
			n := min(piece, len(rest))
			if _, err := p.c.Write(rest[:n]); err != nil {
				break // the device has left
			}
			rest = rest[n:]
		}
		for count := 0; len(in) >= 4 && count < 200; count++ {
			n := binary.BigEndian.Uint32(in)
			if n < 14 || n > 65557 || uint32(len(in)-4) < n {
				return
			}
			if got := r.receive(); !bytes.Equal(got, in[4:4+n]) {
				t.Fatalf("frame %d: got %d bytes, expected %d", count, len(got), n)
			}
			in = in[4+n:]
		}
	})
}

// TestPasst has a guest ask passt for an address, and ping the host by it.
func TestPasst(t *testing.T) {
	if _, err := exec.LookPath("passt"); err != nil {
		t.Skip("passt is not installed (test/setup.sh installs it)")
	}
	path := filepath.Join("/tmp", "govmm-passt-"+filepath.Base(t.TempDir())+".sock")
	t.Cleanup(func() { _ = os.Remove(path) })
	cmd := exec.Command("passt", "--foreground", "--stderr", "--socket", path)
	out := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = out, out
	check(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait(); t.Logf("passt:\n%s", out) })
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("passt makes no socket: %s", out)
		}
	}
	b, d := openSocket(t, "socket="+path+",mac=52:54:00:09:00:02")
	check(t, b.(virtio.Locker).Lock())
	r := newRigOf(t, d, d.Features())
	r.send(0, append(make([]byte, net.HeaderBytes), dhcpDiscover(d.MAC())...))
	for {
		got := r.receive()
		if len(got) > 300 && binary.BigEndian.Uint16(got[12:]) == 0x0800 && got[23] == 17 && binary.BigEndian.Uint16(got[36:]) == 68 {
			options := got[42+240:]
			for len(options) > 2 && options[0] != 53 {
				if options[0] == 0 {
					options = options[1:]
				} else {
					options = options[min(len(options), 2+int(options[1])):]
				}
			}
			if len(options) < 3 || options[2] != 2 || bytes.Equal(got[42+16:42+20], make([]byte, 4)) {
				t.Errorf("DHCP answer % x, expected an offer", got[42:])
			}
			return
		}
	}
}

// dhcpDiscover is a client's first message (RFC 2131).
func dhcpDiscover(mac net.MAC) []byte {
	m := make([]byte, 240)
	m[0], m[1], m[2] = 1, 1, 6
	binary.BigEndian.PutUint32(m[4:], 0x12345678)
	copy(m[28:], mac[:])
	copy(m[236:], []byte{0x63, 0x82, 0x53, 0x63})
	m = append(m, 53, 1, 1, 55, 3, 1, 3, 6, 255)
	m = append(m, make([]byte, 300-len(m))...)
	udp := binary.BigEndian.AppendUint16(nil, 68)
	udp = binary.BigEndian.AppendUint16(udp, 67)
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(m)))
	udp = append(append(udp, 0, 0), m...)
	ip := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255}
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(udp)))
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum+sum>>16))
	f := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, mac[:]...)
	return append(append(append(f, 8, 0), ip...), udp...)
}
