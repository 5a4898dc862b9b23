package usernet

import (
	"io"
	stdnet "net"
	"testing"

	"github.com/govmm/govmm/virtio/net"
)

// The guest of these is another stack of the same kind, in the same process: what is measured
// costs at least twice what the network does.

const piece = 1 << 20

func benchmarkOffloads(b *testing.B, f func(*testing.B, uint16, uint64)) {
	for _, c := range []struct {
		name     string
		mtu      uint16
		offloads uint64
	}{
		{"offloads", 1500, allOffloads},
		{"none", 1500, 0},
		{"checksums", 1500, net.FeatureGuestCsum},
		{"none,mtu=65520", 65520, 0},
	} {
		b.Run(c.name, func(b *testing.B) { f(b, c.mtu, c.offloads) })
	}
}

// BenchmarkFromGuest has the guest send to a listener of the host. Its frames are as long as the
// offloads let them be.
func BenchmarkFromGuest(b *testing.B) {
	benchmarkOffloads(b, func(b *testing.B, mtu uint16, offloads uint64) {
		r := newRig(b, config(), mtu, offloads)
		r.link.guest.Store(offloads) // it cuts its own frames, if the host does not
		done := make(chan struct{})
		to := listen(b, here(b), func(c *stdnet.TCPConn) {
			_, _ = io.Copy(io.Discard, c)
			close(done)
		})
		c, err := r.dial(to)
		check(b, err)
		p := make([]byte, piece)
		b.SetBytes(piece)
		for b.Loop() {
			_, err := c.Write(p)
			check(b, err)
		}
		check(b, c.CloseWrite())
		<-done
	})
}

// BenchmarkToGuest has a listener of the host send to the guest.
func BenchmarkToGuest(b *testing.B) {
	benchmarkOffloads(b, func(b *testing.B, mtu uint16, offloads uint64) {
		r := newRig(b, config(), mtu, offloads)
		to := listen(b, here(b), func(c *stdnet.TCPConn) {
			p := make([]byte, piece)
			for {
				if _, err := c.Write(p); err != nil {
					return
				}
			}
		})
		c, err := r.dial(to)
		check(b, err)
		p := make([]byte, piece)
		b.SetBytes(piece)
		for b.Loop() {
			_, err := io.ReadFull(c, p)
			check(b, err)
		}
		_ = c.Close()
	})
}
