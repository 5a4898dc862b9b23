package net_test

import (
	"bytes"
	"encoding/binary"
	"path/filepath"
	"testing"

	"github.com/containers/gvisor-tap-vsock/pkg/types"
	"github.com/containers/gvisor-tap-vsock/pkg/virtualnetwork"
	"github.com/govmm/govmm/virtio"
)

// TestGvproxy has a guest get its address from gvproxy's network, at a socket as
// gvproxy -listen-qemu has it.
func TestGvproxy(t *testing.T) {
	n, err := virtualnetwork.New(&types.Configuration{MTU: 1500, Subnet: "192.168.127.0/24", GatewayIP: "192.168.127.1", GatewayMacAddress: "5a:94:ef:e4:0c:dd", Protocol: types.QemuProtocol})
	check(t, err)
	path := filepath.Join(t.TempDir(), "n.sock")
	p := newPeer(t, path)
	b, d := openSocket(t, "socket="+path)
	check(t, b.(virtio.Locker).Lock())
	p.accept()
	go func() { _ = n.AcceptQemu(t.Context(), p.c) }()
	r := newRigOf(t, d, d.Features())
	r.send(0, append(make([]byte, 12), dhcpDiscover(d.MAC())...))
	for {
		got := r.receive()
		if len(got) > 300 && binary.BigEndian.Uint16(got[12:]) == 0x0800 && got[23] == 17 && binary.BigEndian.Uint16(got[36:]) == 68 {
			if offer := got[42+16 : 42+20]; !bytes.Equal(offer[:3], []byte{192, 168, 127}) {
				t.Errorf("gvproxy offers % d", offer)
			}
			return
		}
	}
}
