package net_test

import (
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/transport/transporttest"
	"github.com/govmm/govmm/virtio/virtiotest"
	"golang.org/x/sys/unix"
)

// FuzzDevice is a guest that does anything with the registers and rings of a network
// device with two pairs of queues, while frames arrive and the link changes.
func FuzzDevice(f *testing.F) {
	var w *wire
	transporttest.Fuzz(f, transporttest.Device{
		New: func(t testing.TB, _ *virtiotest.Memory) virtio.Device {
			w = newWire(t, 2)
			d, err := net.New(net.Config{Backend: w, MAC: guestMAC, MTU: 1500})
			check(t, err)
			return d
		},
		Host: func(_ testing.TB, d virtio.Device, what byte, value uint16) {
			if what&2 != 0 {
				d.(*net.Device).SetLink(what&1 != 0)
				return
			}
			_, _ = unix.Write(w.peers[what&1], frame(14+int(value))) // it may be full
		},
		Requests: []transporttest.Request{
			{Queue: 0, Writable: 32},
			{Queue: 1, Readable: append(make([]byte, 12), frame(60)...)},
			{Queue: 4, Readable: []byte{4, 0, 2, 0}, Writable: 1}, // two pairs
			{Queue: 4, Readable: []byte{1, 1, 2, 0, 0, 0, 0, 1}, Writable: 1},
			{Queue: 4, Readable: []byte{5, 0, 3, 0, 0, 0, 0, 0, 0, 0}, Writable: 1},
			{Queue: 4, Readable: []byte{3, 0}, Writable: 1},
			{Queue: 2, Writable: 32},
			{Queue: 3, Readable: append([]byte{1, 1, 40, 0, 0, 2, 14, 0, 16, 0, 0, 0}, frame(100)...)},
		},
	})
}
