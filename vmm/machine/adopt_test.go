package machine

import (
	"fmt"
	"math"
	"reflect"
	"slices"
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/vsock"
	"github.com/govmm/govmm/vmm/cpu"
	"github.com/govmm/govmm/vmm/memory"
)

// FuzzAdopt: whatever names a peer sends, and however many devices, each text in the
// spec of a machine that is built is this host's, but for what the guest has seen.
func FuzzAdopt(f *testing.F) {
	f.Add("/etc/shadow", "eth0", "br0", "/run/docker.sock", "root", uint8(1), uint8(1), uint8(1))
	f.Add("relative", "", "", "x", "", uint8(2), uint8(0), uint8(2))
	f.Add("/here/disk0", "here0", "", "/here/socket", "", uint8(0), uint8(2), uint8(0x15))
	f.Add("/proc/self/mem", "", "lo", "/v", "", uint8(3), uint8(2), uint8(0x3f))
	f.Fuzz(func(t *testing.T, path, tap, bridge, socket, id string, disks, nets, given uint8) {
		s := aSpec()
		s.Devices = nil
		for i := range disks % 4 {
			s.Devices = append(s.Devices, &blk.Spec{Config: blk.Config{Path: fmt.Sprint(path, i), ID: id, Raw: i&1 != 0}, Size: uint64(i) << 12})
		}
		for i := range nets % 3 {
			name := tap
			if i > 0 {
				name = ""
			}
			s.Devices = append(s.Devices, &net.Spec{Options: net.Options{Tap: name, Bridge: bridge, MAC: net.MAC{0x52, 0x54, 0, 0, 0, i}, Queues: 1}})
		}
		s.Devices = append(s.Devices, &vsock.Spec{Config: vsock.Config{Path: socket}})
		if given&0x40 != 0 {
			s.Backing = memory.Hugetlb
		}
		config, err := s.encode(nil)
		check(t, err)
		spec, err := decodeSpec(config, nil)
		if err != nil {
			return // it is refused
		}
		b := Builder{Devices: givenHere(t, given)}
		if _, err := b.adopt(&spec, false); err != nil {
			return
		}
		if spec.Backing == memory.Hugetlb {
			t.Error("the guest gets a pool of huge pages that was not given")
		}
		allowed := []string{""}
		for _, d := range b.Devices {
			textsOf(reflect.ValueOf(d), "", func(_, text string) { allowed = append(allowed, text) })
		}
		for _, d := range spec.Devices {
			textsOf(reflect.ValueOf(d), d.Kind(), func(where, text string) {
				if where != "disk.Config.ID" && !slices.Contains(allowed, text) {
					t.Errorf("%s is %q, which a peer has sent", where, text)
				}
			})
		}
	})
}

// givenHere are devices of this host, how many the bits of given say.
func givenHere(t *testing.T, given uint8) (devices []virtio.Spec) {
	for i := range given & 3 {
		devices = append(devices, disk(fmt.Sprintf("/here/disk%d", i)))
	}
	for i := range given >> 2 & 3 {
		d, err := net.Kind.ParseHere(fmt.Sprintf("tap=here%d,bridge=herebr", i))
		check(t, err)
		devices = append(devices, d)
	}
	if given>>4&1 != 0 {
		devices = append(devices, socket(0, "/here/socket"))
	}
	return devices
}

// textsOf calls f for each string in v, with the names of the fields that lead to it.
func textsOf(v reflect.Value, where string, f func(where, text string)) {
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface:
		if !v.IsNil() {
			textsOf(v.Elem(), where, f)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			textsOf(v.Field(i), where+"."+v.Type().Field(i).Name, f)
		}
	case reflect.Slice:
		for i := range v.Len() {
			textsOf(v.Index(i), where, f)
		}
	case reflect.String:
		f(where, v.String())
	}
}

// checkDecodedState decodes a state of a peer. What passes the check has each MSR once,
// and a PIT that this host could have.
func checkDecodedState(t *testing.T, b []byte) {
	s, err := decodeState(b)
	if err != nil {
		return
	}
	ids := make([]uint32, len(s.VCPUs))
	for i, v := range s.VCPUs {
		ids[i] = v.ID
	}
	if s.Reset != nil || s.check(ids, nil, cpu.SavedMSRs([]uint32{0x174, 0x175, 0x176})) != nil {
		return
	}
	for _, v := range s.VCPUs {
		seen := map[uint32]bool{}
		for _, m := range v.MSRs {
			if seen[m.Index] {
				t.Errorf("MSR %#x is loaded twice", m.Index)
			}
			seen[m.Index] = true
		}
	}
	for _, c := range s.Chips.PIT.Channels {
		if c.Count > math.MaxUint16+1 {
			t.Errorf("the PIT has a count of %d", c.Count)
		}
	}
}
