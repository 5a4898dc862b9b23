package test

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/govmm/govmm/mempage"
)

// TestDestinationKilled: when the destination is killed, the guest goes on at once and
// can be migrated elsewhere.
func TestDestinationKilled(t *testing.T) {
	needKVM(t)
	moments := []struct {
		name string
		typ  byte
		nth  int // of that frame; of ROUND 1 if it is a ROUND
	}{
		{"round 0", framePages, 3}, {"round 1", frameRound, 1}, {"stop", frameState, 1},
	}
	for _, m := range moments {
		t.Run(m.name, func(t *testing.T) {
			h := newHost(t)
			src := h.startDemo("src", 2, 256, 128, 64)
			dst, addr := h.receive("dst")
			var seen atomic.Int64
			proxy := newWireProxy(t, addr, func(toSource bool, typ byte, round uint64) bool {
				if !toSource && typ == m.typ && (typ != frameRound || round == 1) && int(seen.Add(1)) == m.nth {
					dst.kill(syscall.SIGKILL)
					<-dst.done
				}
				return true
			})
			// Within 1 ms no more than 100 KiB can be sent: there is a second
			// round. The stop is reached at full speed.
			args := []string{"src", "--to", proxy.addr, "--json"}
			if m.typ != frameState {
				args = append(args, "--bandwidth-limit", "100M", "--downtime-limit", "1ms")
			}
			r, exit := h.migrate(args...)
			if exit < 3 || r.Status != "failed" || r.Error == "" {
				t.Fatalf("exit %d, %+v", exit, r)
			}
			if s := h.info("src").State; s != "running" {
				t.Errorf("the source is %q", s)
			}
			at := src.out.len()
			awaitVerified(t, src.out, at, 128*mib/mempage.Size)
			// The longest time without a write, by the guest's own clock. A source
			// that waited for its peer to time out would take 10 s.
			for _, k := range src.out.ticks() {
				if k.gap > 5000 {
					t.Errorf("the guest stood still for %.0f ms", k.gap)
				}
			}
			there, addr := h.receive("elsewhere")
			if r, exit := h.migrate("src", "--to", addr, "--verify-pages"); exit != 0 {
				t.Fatalf("elsewhere: %+v", r)
			}
			awaitVerified(t, there.out, 0, 128*mib/mempage.Size)
		})
	}
}

// TestSourceKilled: if the source is killed before COMMIT has arrived, the destination
// gives up, says so, and never runs the guest. If it is killed later, the destination
// runs the guest.
func TestSourceKilled(t *testing.T) {
	needKVM(t)
	for _, m := range []struct {
		name string
		typ  byte
		pass bool
		runs bool
	}{
		{"in a round", framePages, false, false},
		{"before STATE", frameState, false, false},
		{"before COMMIT", frameCommit, false, false},
		{"after COMMIT", frameCommit, true, true},
	} {
		t.Run(m.name, func(t *testing.T) {
			h := newHost(t)
			src := h.startDemo("src", 2, 256, 128, 16)
			dst, addr := h.receive("dst")
			var struck atomic.Bool
			proxy := newWireProxy(t, addr, func(toSource bool, typ byte, _ uint64) bool {
				if !toSource && typ == m.typ && !struck.Swap(true) {
					src.kill(syscall.SIGKILL)
					<-src.done
					return m.pass
				}
				return true
			})
			r, exit := h.migrate("src", "--to", proxy.addr, "--json")
			if exit < 3 || r.Status != "failed" || r.Error == "" {
				t.Errorf("migrate whose VM was killed: exit %d, %+v", exit, r)
			}
			if m.runs {
				awaitVerified(t, dst.out, 0, 128*mib/mempage.Size)
				return
			}
			dst.err.awaitText(t, 0, "still listening")
			if dst.out.len() != 0 {
				t.Errorf("the guest ran: %q", dst.out.tail(3))
			}
			if s := h.info("dst").State; s != "receiving" {
				t.Errorf("the destination is %q", s)
			}
			// The destination can be used again.
			h.startDemo("other", 1, 128, 32, 4)
			if r, exit := h.migrate("other", "--to", addr); exit != 0 {
				t.Fatalf("the next migration: %+v", r)
			}
			awaitVerified(t, dst.out, 0, 32*mib/mempage.Size)
		})
	}
}

// TestNetworkDiesAtHandoff: the network fails around COMMIT and RUNNING. Once both can
// talk, exactly one runs the guest.
func TestNetworkDiesAtHandoff(t *testing.T) {
	needKVM(t)
	for _, m := range []struct {
		name     string
		toSource bool
		typ      byte
		runsAt   string
	}{
		{"PREPARED lost", true, framePrepared, "src"},
		{"COMMIT lost", false, frameCommit, ""},
		{"RUNNING lost", true, frameRunning, "dst"},
	} {
		t.Run(m.name, func(t *testing.T) {
			h := newHost(t)
			src := h.startDemo("src", 2, 128, 64, 16)
			dst, addr := h.receive("dst")
			var struck atomic.Bool
			proxy := newWireProxy(t, addr, func(toSource bool, typ byte, _ uint64) bool {
				return !(toSource == m.toSource && typ == m.typ && !struck.Swap(true))
			})
			r, exit := h.migrate("src", "--to", proxy.addr, "--json")
			at, owned := src, "src"
			if exit == 0 {
				at, owned = dst, "dst"
			}
			if m.runsAt != "" && owned != m.runsAt {
				t.Errorf("the guest runs at %s: exit %d, %+v", owned, exit, r)
			}
			from := at.out.len()
			awaitVerified(t, at.out, from, 64*mib/mempage.Size)
			if owned == "src" {
				if dst.out.len() != 0 {
					t.Error("the destination runs it too")
				}
			} else if src.wait() != 0 {
				t.Errorf("the source exits %d", src.exit)
			}
		})
	}
}

// TestHandoffUnknown: COMMIT has arrived, and the destination is killed before it
// answers. The source cannot know that, so it stays stopped and refuses to resume,
// except with --force.
func TestHandoffUnknown(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	src := h.startDemo("src", 1, 128, 64, 16)
	dst, addr := h.receive("dst")
	proxy := newWireProxy(t, addr, func(toSource bool, typ byte, _ uint64) bool {
		if toSource && typ == frameRunning {
			dst.kill(syscall.SIGKILL)
			<-dst.done
			return false
		}
		return true
	})
	r, exit := h.migrate("src", "--to", proxy.addr)
	if exit < 3 || r.Status != "failed" || !strings.Contains(r.Error, "force") {
		t.Errorf("exit %d, %+v", exit, r)
	}
	if s := h.info("src").State; s != "handoff-unknown" {
		t.Fatalf("the source is %q", s)
	}
	if _, errs, exit := h.run("resume", "src"); exit != 1 || !strings.Contains(errs, "--force") {
		t.Errorf("resume without force: exit %d, %q", exit, errs)
	}
	at := src.out.len()
	h.must("resume", "src", "--force")
	awaitVerified(t, src.out, at, 64*mib/mempage.Size)
}

// TestHostilePeers: peers that do not speak the protocol are refused with one line
// each, and a guest can still arrive.
func TestHostilePeers(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	dst, addr := h.receive("dst")
	hello := func(version, min uint16) []byte {
		b := make([]byte, 64)
		copy(b, "GOVMMLM\n")
		binary.LittleEndian.PutUint16(b[8:], version)
		binary.LittleEndian.PutUint16(b[10:], min)
		b[12], b[16], b[24] = 1, 1, byte(len(dst.err.tail(1000)))+1
		return b
	}
	frame := func(typ byte, length uint32, first uint64, count uint32, payload ...byte) []byte {
		b := make([]byte, 24)
		b[0] = typ
		binary.LittleEndian.PutUint32(b[4:], length)
		binary.LittleEndian.PutUint64(b[8:], first)
		binary.LittleEndian.PutUint32(b[16:], count)
		return append(b, payload...)
	}
	noise, err := os.ReadFile(govmm)
	if err != nil {
		t.Fatal(err)
	}
	for name, say := range map[string]func() []byte{
		"garbage": func() []byte { return noise[:1<<20] },
		"http": func() []byte {
			return []byte("GET / HTTP/1.0\r\nHost: a.example\r\nUser-Agent: x\r\nAccept: */*\r\n\r\n\r\n")
		},
		"too new":       func() []byte { return hello(7, 6) },
		"version 0":     func() []byte { return hello(0, 0) },
		"truncated":     func() []byte { return hello(3, 3)[:40] },
		"huge config":   func() []byte { return append(hello(3, 3), frame(frameConfig, math.MaxUint32, 0, 0)...) },
		"bad config":    func() []byte { return append(hello(3, 3), frame(frameConfig, 3, 0, 0, 0xbf, 0xff, 0x00)...) },
		"cut config":    func() []byte { return append(hello(3, 3), frame(frameConfig, 1<<28, 0, 0, 1, 2, 3)...) },
		"pages too far": func() []byte { return append(hello(3, 3), frame(framePages, math.MaxUint32, 1<<63, 1024)...) },
	} {
		from := dst.err.len()
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write(say()) // it may be cut off
		_ = c.(*net.TCPConn).CloseWrite()
		_ = c.SetReadDeadline(time.Now().Add(patience))
		_, _ = io.Copy(io.Discard, c)
		c.Close()
		at := dst.err.await(t, from, "a line about "+name, func(string) bool { return true })
		if line := dst.err.snapshot()[at]; strings.Contains(line, "panic") || strings.Contains(line, "goroutine") {
			t.Fatalf("%s: %s", name, line)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", dst.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var rss int
	for _, l := range strings.Split(string(status), "\n") {
		_, _ = fmt.Sscanf(l, "VmHWM: %d kB", &rss)
	}
	if rss == 0 || rss > 200<<10 {
		t.Errorf("the destination used %d KiB for peers that sent almost nothing", rss)
	}
	// A silent connection does not block others.
	quiet, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
	h.startDemo("src", 1, 128, 32, 4)
	if r, exit := h.migrate("src", "--to", addr); exit != 0 {
		t.Fatalf("%+v", r)
	}
	awaitVerified(t, dst.out, 0, 32*mib/mempage.Size)
	dst.err.awaitText(t, 0, "did not say hello")
}

// TestHostileDestinations: the guest goes on at the source if the destination does not
// speak the protocol.
func TestHostileDestinations(t *testing.T) {
	needKVM(t)
	h := newHost(t)
	src := h.startDemo("src", 1, 128, 32, 4)
	for name, say := range map[string]string{
		"closes at once": "",
		"garbage":        strings.Repeat("\xff", 4096),
		"http":           "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
	} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = io.CopyN(io.Discard, c, 64)
			_, _ = io.WriteString(c, say)
			c.Close()
		}()
		r, exit := h.migrate("src", "--to", ln.Addr().String())
		ln.Close()
		if exit < 3 || r.Status != "failed" || r.Error == "" || strings.Contains(r.Error, "\n") {
			t.Errorf("%s: exit %d, %+v", name, exit, r)
		}
	}
	r, exit := h.migrate("src", "--to", "127.0.0.1:1")
	if exit < 3 || !strings.Contains(r.Error, "127.0.0.1:1") {
		t.Errorf("nobody listens: exit %d, %+v", exit, r)
	}
	at := src.out.len()
	src.out.awaitTick(t, at, "after all that", func(tick) bool { return true })
}
