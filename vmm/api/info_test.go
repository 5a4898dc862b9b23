package api_test

import (
	"encoding/json"
	"reflect"
	"testing"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/console"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/rng"
	"github.com/govmm/govmm/virtio/vsock"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/sandbox"
)

// toy describes a device of a kind that is not among the built-in ones.
type toy struct {
	Colour string `json:"colour"`
}

func (*toy) Lines() []string { return nil }

// devices is one of each kind.
func devices() vmm.Devices {
	return vmm.Devices{
		{Kind: balloon.Kind, Name: "balloon", Info: &balloon.Info{Target: 2, Actual: 1}},
		{Kind: rng.Kind, Name: "rng"},
		{Kind: console.Kind, Name: "console"},
		{Kind: blk.Kind, Name: "disk a", Info: &blk.Info{Path: "a", Size: 512, Queues: 1}},
		{Kind: net.Kind, Name: "net b", Info: &net.Info{MAC: "52:54:00:01:02:03", Tap: "tap7", Queues: 1}},
		{Kind: vsock.Kind, Name: "vsock cid 5", Info: &vsock.Info{CID: 5, Path: "c"}},
	}
}

// The fields that docs/api.md promises, and no others.
func TestInfoJSON(t *testing.T) {
	unknown := machine.DeviceInfo{Kind: virtio.Kind{Name: "toy"}, Name: "toy 1", Info: &toy{"red"}}
	for _, tc := range []struct {
		name string
		info vmm.Info
		want string
	}{
		{"a receiver that waits", vmm.Info{Name: "a", PID: 1, State: vmm.StateReceiving, Address: "h:1", Sandbox: sandbox.Status{Mode: sandbox.Off}},
			`{"name":"a","pid":1,"state":"receiving","address":"h:1","cpus":0,"memory":0,"sandbox":{"mode":"off","landlock":0,"seccomp":false},"api_socket":"SOCKET"}`},
		{"no device", vmm.Info{Name: "a", State: vmm.StateRunning, CPUs: 1, Memory: 4096, Kernel: "ELF", Panicked: true, Devices: vmm.Devices{},
			Sandbox: sandbox.Status{Mode: sandbox.On, Landlock: 3, Seccomp: true, Capabilities: []string{}, Missing: []string{"b"}}},
			`{"name":"a","pid":0,"state":"running","address":"","cpus":1,"memory":4096,"kernel":"ELF","panicked":true,` +
				`"devices":{"rng":false,"console":false,"disks":[],"nets":[]},` +
				`"sandbox":{"mode":"on","landlock":3,"seccomp":true,"capabilities":[],"missing":["b"]},"api_socket":"SOCKET"}`},
		{"every device", vmm.Info{Name: "a", Devices: append(devices(), unknown)},
			`{"name":"a","pid":0,"state":"","address":"","cpus":0,"memory":0,"devices":{"balloon":{"target":2,"actual":1},"rng":true,"console":true,` +
				`"disks":[{"path":"a","size":512,"readonly":false,"direct":false,"queues":1,"read_bytes":0,"written_bytes":0,"errors":0}],` +
				`"nets":[{"mac":"52:54:00:01:02:03","tap":"tap7","queues":1,"rx_frames":0,"rx_bytes":0,"rx_dropped":0,"tx_frames":0,"tx_bytes":0,"tx_dropped":0}],` +
				`"vsock":{"cid":5,"path":"c"},"toys":[{"colour":"red"}]},"sandbox":{"mode":"","landlock":0,"seccomp":false},"api_socket":"SOCKET"}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b, err := json.Marshal(api.Info{Info: tc.info, Socket: "SOCKET"})
			if err != nil {
				t.Fatal(err)
			}
			var got, want any
			if err := json.Unmarshal([]byte(tc.want), &want); err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(b, &got); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%s, want %s", b, tc.want)
			}
			// A client that does not know a kind reads everything else.
			var back api.Info
			if err := json.Unmarshal(b, &back); err != nil || back.Name != tc.info.Name || back.Socket != "SOCKET" || (back.Devices == nil) != (tc.info.Devices == nil) {
				t.Errorf("%+v, %v", back, err)
			}
			for i, d := range back.Devices {
				if want := tc.info.Devices[i]; d.Kind.Name != want.Kind.Name || !reflect.DeepEqual(d.Info, want.Info) {
					t.Errorf("device %d is %+v, want %+v", i, d, want)
				}
			}
			if n := len(back.Devices); tc.name == "every device" && n != 6 {
				t.Errorf("%d devices", n)
			}
		})
	}
}
