package migrate

import (
	"net"
	"sync"
	"testing"

	"github.com/govmm/govmm/internal/testcert"
	"github.com/govmm/govmm/mempage"
)

// BenchmarkSpans moves spans of 4 MiB from memory to memory by loopback TCP, plain and over
// TLS, by one connection and by two.
func BenchmarkSpans(b *testing.B) {
	ca := testcert.NewCA(b, "the CA")
	credentials, err := newCredentials(ca.Client(ca.Issue(b, "source"), "destination"), "")
	if err != nil {
		b.Fatal(err)
	}
	server, err := serverTLS(ca.Server(ca.Issue(b, "destination")))
	if err != nil {
		b.Fatal(err)
	}
	for _, bm := range []struct {
		name   string
		secure bool
		conns  int
	}{{"plain/1", false, 1}, {"plain/2", false, 2}, {"TLS/1", true, 1}, {"TLS/2", true, 2}} {
		b.Run(bm.name, func(b *testing.B) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			defer ln.Close()
			var all sync.WaitGroup
			b.SetBytes(int64(bm.conns) * maxSpan * mempage.Size)
			for range bm.conns {
				there, err := net.Dial("tcp", ln.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				here, err := ln.Accept()
				if err != nil {
					b.Fatal(err)
				}
				out, in := newConn(there), newConn(here)
				ready := make(chan struct{})
				all.Go(func() {
					defer in.Close()
					if bm.secure {
						var first [1]byte
						if err := in.readFull(first[:]); err != nil {
							b.Error(err)
						}
						if err := (&Receiver{tls: server, keyLimit: 1 << 62}).handshake(in, first[0]); err != nil {
							b.Error(err)
						}
					}
					close(ready)
					receiveSpans(b, in)
				})
				if bm.secure {
					if err := credentials.handshake(b.Context(), out); err != nil {
						b.Fatal(err)
					}
					out.lower.limit = 1 << 62
				}
				<-ready
				all.Go(func() {
					defer out.Close()
					sendSpans(b, out)
				})
			}
			all.Wait()
		})
	}
}

func sendSpans(b *testing.B, c *conn) {
	memory := make([]byte, 64<<20)
	for i := range memory {
		memory[i] = byte(i>>12) | 1
	}
	meta := make([]byte, 256)
	bufs := make(net.Buffers, 3)
	for i := range b.N {
		span := memory[i*maxSpan*mempage.Size%len(memory):][:maxSpan*mempage.Size]
		bufs[2] = span
		if err := c.writeSpan(header{typ: framePages, count: maxSpan, length: uint32(len(meta) + len(span))}, meta, bufs); err != nil {
			b.Error(err)
			return
		}
		bufs = bufs[:3]
	}
}

func receiveSpans(b *testing.B, c *conn) {
	memory := make([]byte, 64<<20)
	meta := make([]byte, 256)
	iov := make([][]byte, 1)
	for i := range b.N {
		h, err := c.readHeader()
		if err == nil {
			err = c.readFull(meta)
		}
		if err == nil {
			iov = append(iov[:0], memory[i*maxSpan*mempage.Size%len(memory):][:int(h.length)-len(meta)])
			err = c.readv(iov)
		}
		if err != nil {
			b.Error(err)
			return
		}
	}
}
