package main

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/limit"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/rng"
	"github.com/govmm/govmm/virtio/vsock"
)

// TestRecord: what a VM was started with is read as it was written, and what this version
// does not know is refused by its name.
func TestRecord(t *testing.T) {
	f := new(hostFlags)
	set := hostFlagSet(f)
	for name, value := range map[string]string{"serial": "file:/tmp/a,max=1G", "console": "null", "migrate-ports": "4444,4445", "overcommit": "true", "user": "nobody", "sandbox": "off", "api-socket": "/tmp/x"} {
		if err := set.Set(name, value); err != nil {
			t.Fatal(err)
		}
	}
	owner := uint32(7)
	devices := []virtio.Spec{
		&blk.Spec{Config: blk.Config{Path: "/srv/a.img", ID: "x", Limit: limit.Rates{BPS: 1 << 20}}, Size: 1 << 20},
		&rng.Spec{},
		&net.Spec{Options: net.Options{Tap: "tap0", MAC: net.MAC{2, 0, 0, 0, 0, 9}, Queues: 2, Owner: &owner, Policy: net.Policy{Antispoof: true, IPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.2/32")}}}},
		&vsock.Spec{Config: vsock.Config{Path: "/run/v.sock", CID: 9}},
	}
	text, err := recordOf("web", "run", set, devices, true)
	if err != nil {
		t.Fatal(err)
	}
	r, g, got, err := readRecord(text)
	if err != nil {
		t.Fatal(err)
	}
	if r.Name != "web" || !r.TrustPaths || g.serial != f.serial || g.console != "null" || len(g.ports) != 2 || g.ports[1] != 4445 || !g.overcommit {
		t.Errorf("read %+v, %+v", r, g)
	}
	if g.user != "" || g.sandbox != "auto" || g.socket != "" {
		t.Errorf("user %q, sandbox %q and socket %q are not for the record", g.user, g.sandbox, g.socket)
	}
	want := []virtio.Spec{devices[0], devices[2], devices[3]}
	a, _ := json.Marshal(want)
	b, _ := json.Marshal(got)
	if !bytes.Equal(a, b) {
		t.Errorf("devices: expected %s, found %s", a, b)
	}
	if d := got[1].(*net.Spec); *d.Owner != 7 || d.Policy.IPs[0].String() != "10.0.0.2/32" || !d.Policy.Antispoof || got[0].(*blk.Spec).Limit.BPS != 1<<20 {
		t.Errorf("what belongs to the host is lost: %s", b)
	}
	for text, want := range map[string]string{
		"":                     "was not recorded",
		"{}{":                  "",
		`{"name":"a","new":1}`: `"new"`,
		`{"name":"a","flags":[{"name":"future","values":["1"],"host":true}]}`:  "--future",
		`{"name":"a","flags":[{"name":"user","values":["root"],"host":true}]}`: "--user",
		`{"name":"a","flags":[{"name":"serial","values":["x"],"host":true}]}`:  "--serial",
		`{"name":"a","devices":[{"kind":"gpu","spec":{}}]}`:                    `"gpu"`,
		`{"name":"a","devices":[{"kind":"disk","spec":{"Foo":1}}]}`:            "Foo",
		`{"name":"a","devices":[{"kind":"disk","spec":{"Path":""}}]}`:          "disk",
	} {
		if _, _, _, err := readRecord([]byte(text)); text != "{}{" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: expected an error with %s, found %v", text, want, err)
		}
	}
}

// FuzzRecord: whatever is in the file, it is read or refused.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"name":"a","flags":[{"name":"serial","values":["null"],"host":true}],"devices":[{"kind":"disk","spec":{"Path":"/a","Queues":1}}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		r, flags, devices, err := readRecord(text)
		if err != nil {
			return
		}
		_ = r
		if flags.check() != nil {
			t.Error("flags that make no sense were read")
		}
		for _, d := range devices {
			if d.Validate() != nil {
				t.Errorf("%s makes no sense and was read", d)
			}
		}
	})
}
