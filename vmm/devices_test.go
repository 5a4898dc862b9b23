package vmm

import (
	"encoding/json"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/console"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/rng"
	"github.com/govmm/govmm/virtio/vsock"
	"github.com/govmm/govmm/vmm/machine"
)

// TestDevicesJSON: the JSON of a VM's devices is part of the API, and can be decoded
// into what it was made from.
func TestDevicesJSON(t *testing.T) {
	info := func(k virtio.Kind, i virtio.Info) machine.DeviceInfo {
		return machine.DeviceInfo{Kind: k, Name: k.Name, Info: i}
	}
	oneOfEach := Devices{
		info(balloon.Kind, &balloon.Info{Target: 4096, Actual: 8192}), info(rng.Kind, nil), info(console.Kind, nil),
		info(blk.Kind, &blk.Info{Path: "a.img", Size: 1 << 20, ID: "root", Queues: 1, ReadBytes: 512}),
		info(net.Kind, &net.Info{MAC: "52:54:00:00:00:01", Tap: "tap0", Queues: 1, RxFrames: 3}),
		info(vsock.Kind, &vsock.Info{CID: 3, Path: "/run/v"}),
	}
	for _, c := range []struct {
		devices Devices
		want    string
	}{
		{Devices{}, `{"console":false,"disks":[],"nets":[],"rng":false}`},
		{nil, `{"console":false,"disks":[],"nets":[],"rng":false}`},
		{oneOfEach, `{"balloon":{"target":4096,"actual":8192},"console":true,` +
			`"disks":[{"path":"a.img","size":1048576,"readonly":false,"direct":false,"id":"root","queues":1,"read_bytes":512,"written_bytes":0,"errors":0}],` +
			`"nets":[{"mac":"52:54:00:00:00:01","tap":"tap0","queues":1,"rx_frames":3,"rx_bytes":0,"rx_dropped":0,"tx_frames":0,"tx_bytes":0,"tx_dropped":0}],` +
			`"rng":true,"vsock":{"cid":3,"path":"/run/v"}}`},
		{Devices{info(blk.Kind, &blk.Info{Path: "a"}), info(blk.Kind, &blk.Info{Path: "b"})}, `{"console":false,"disks":[` +
			`{"path":"a","size":0,"readonly":false,"direct":false,"queues":0,"read_bytes":0,"written_bytes":0,"errors":0},` +
			`{"path":"b","size":0,"readonly":false,"direct":false,"queues":0,"read_bytes":0,"written_bytes":0,"errors":0}],"nets":[],"rng":false}`},
	} {
		b, err := json.Marshal(c.devices)
		check(t, err)
		if string(b) != c.want {
			t.Errorf("JSON %s, want %s", b, c.want)
		}
		var back Devices
		check(t, json.Unmarshal(b, &back))
		if len(back) != len(c.devices) {
			t.Fatalf("%d devices became %d", len(c.devices), len(back))
		}
		for i, d := range back {
			if want := c.devices[i]; d.Kind.Name != want.Kind.Name || !reflect.DeepEqual(d.Info, want.Info) {
				t.Errorf("device %d: %s %+v became %s %+v", i, want.Kind.Name, want.Info, d.Kind.Name, d.Info)
			}
		}
	}
	if d := oneOfEach.Of("vsock"); d.(*vsock.Info).CID != 3 {
		t.Errorf("vsock: %+v", d)
	}
	if oneOfEach.Of("rng") != nil || oneOfEach.Of("toy") != nil {
		t.Error("a device without a description has one")
	}

	var later Devices
	check(t, json.Unmarshal([]byte(`{"gpu":{"heads":2},"rng":true}`), &later))
	if len(later) != 1 || later[0].Kind.Name != "rng" {
		t.Errorf("with a kind that is not known: %+v", later)
	}
	for _, bad := range []string{`[]`, `{"rng":1}`, `{"disks":{}}`, `{"disks":[1]}`, `{"vsock":[]}`} {
		if err := json.Unmarshal([]byte(bad), &later); err == nil {
			t.Errorf("%s was decoded", bad)
		}
	}
}

// TestDevicesOfAVM: Info has the JSON of the devices that a VM was made with.
func TestDevicesOfAVM(t *testing.T) {
	needKVM(t)
	dir := t.TempDir()
	cfg := testConfig(1, vmtest.Obey)
	cfg.Console = vmtest.NewTape()
	cfg.Devices = []virtio.Spec{&vsock.Spec{Config: vsock.Config{CID: 9, Path: filepath.Join(dir, "v")}}, disk(vmtest.Image(t, "a.img", 1<<20)), &rng.Spec{}, &balloon.Spec{}}
	vm, err := NewVM(cfg)
	check(t, err)
	defer func() { check(t, vm.Stop(vmtest.Within(t))) }()
	b, err := json.Marshal(vm.Info())
	check(t, err)
	for _, part := range []string{`"balloon":{"target":0,"actual":0}`, `"console":true`, `"path":"` + cfg.Devices[1].(*blk.Spec).Path + `","size":1048576`,
		`"nets":[]`, `"rng":true`, `"vsock":{"cid":9,"path":"` + dir + `/v"}`} {
		if !strings.Contains(string(b), part) {
			t.Errorf("%s lacks %s", b, part)
		}
	}
	var back Info
	check(t, json.Unmarshal(b, &back))
	if len(back.Devices) != 5 {
		t.Errorf("decoded: %+v", back.Devices)
	}
}
