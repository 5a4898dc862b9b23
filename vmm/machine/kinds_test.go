package machine

import (
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/vsock"
)

func specs(list ...virtio.Spec) []virtio.Spec { return list }

func socket(cid uint32, path string) *vsock.Spec {
	return &vsock.Spec{Config: vsock.Config{CID: cid, Path: path}}
}

// TestVsockOverride: the path is the host's choice, the CID the guest's.
func TestVsockOverride(t *testing.T) {
	guest := socket(77, "/there")
	check(t, move(specs(guest), nil, Kinds(), true))
	if guest.Path != "/there" {
		t.Errorf("no device given on this host: %v", guest.Config)
	}
	check(t, move(specs(guest), specs(socket(0, "/here")), Kinds(), true))
	check(t, move(specs(guest), specs(socket(77, "/here")), Kinds(), true))
	if guest.Config != (vsock.Config{CID: 77, Path: "/here"}) || guest.String() != "vsock cid 77" {
		t.Errorf("%v, %v", guest.Config, guest)
	}
	for _, c := range []struct {
		guest []virtio.Spec
		here  *vsock.Spec
		says  string
	}{
		{specs(guest), socket(78, "/x"), "vsock /x: the CID is the guest's and cannot change when it moves; it is 77"},
		{nil, socket(0, "/x"), "vsock: expected 0 as at the source, 1 given on this host"},
	} {
		if err := move(c.guest, specs(c.here), Kinds(), true); err == nil || err.Error() != c.says {
			t.Errorf("error %v, want %q", err, c.says)
		}
	}
	if errs := validateDevices(specs(socket(2, "/x")), Kinds()); len(errs) != 1 || !strings.Contains(errs[0].Error(), "vsock /x: cid must be between") {
		t.Errorf("%v", errs)
	}
}

// TestMove: devices of this host replace the source's one for one. What the guest
// knows of a device does not change.
func TestMove(t *testing.T) {
	conf := func(words string) virtio.Spec {
		d, err := blk.Kind.Parse(words)
		check(t, err)
		return d
	}
	here := func(words string) virtio.Spec {
		d, err := blk.Kind.ParseHere(words)
		check(t, err)
		return d
	}
	nic := func(words string) virtio.Spec {
		d, err := net.Kind.ParseHere(words)
		check(t, err)
		return d
	}
	guest := func() []virtio.Spec {
		two, err := net.Kind.Parse("tap=tap2,mac=52:54:00:00:00:02,mtu=1400")
		check(t, err)
		return specs(&balloon.Spec{}, conf("path=/a,id=root,queues=2"), conf("path=/b,readonly"), two)
	}

	moved := guest()
	check(t, move(moved, specs(conf("path=/x,direct"), nic("tap=here0,bridge=br0,mac=52:54:00:00:00:02"), conf("path=/y,readonly")), Kinds(), true))
	a, b, n := moved[1].(*blk.Spec), moved[2].(*blk.Spec), moved[3].(*net.Spec)
	if a.Path != "/x" || !a.Direct || a.ID != "root" || a.Queues != 2 {
		t.Errorf("first disk %+v", a)
	}
	if b.Path != "/y" || b.Direct || !b.ReadOnly {
		t.Errorf("second disk %+v", b)
	}
	if n.Tap != "here0" || n.Bridge != "br0" || n.MTU != 1400 || n.MAC.String() != "52:54:00:00:00:02" {
		t.Errorf("network device %+v", n)
	}
	byName := guest()
	check(t, move(byName, specs(conf("path=/q"), here("path=/r,for=root"), nic("tap=t")), Kinds(), true))
	if a, b := byName[1].(*blk.Spec), byName[2].(*blk.Spec); a.Path != "/r" || b.Path != "/q" {
		t.Errorf("disks by name: %+v, %+v", a, b)
	}
	same := guest()
	check(t, move(same, nil, Kinds(), true))
	if p := same[1].(*blk.Spec); p.Path != "/a" || same[3].(*net.Spec).Tap != "tap2" {
		t.Errorf("nothing given: %+v, %+v", p, same[3])
	}

	for _, c := range []struct {
		here []virtio.Spec
		says []string
	}{
		{specs(conf("path=/x")), []string{"disk: expected 2 as at the source, 1 given on this host"}},
		{specs(conf("path=/x"), conf("path=/y"), conf("path=/z")), []string{"disk: expected 2 as at the source, 3 given on this host"}},
		{specs(nic("tap=t"), nic("tap=u"), socket(0, "/v")), []string{"net: expected 1 as at the source, 2 given", "vsock: expected 0 as at the source, 1 given"}},
		{specs(conf("path=/x"), conf("path=/y"), nic("tap=t,mac=52:54:00:00:00:03")),
			[]string{`net 52:54:00:00:00:03: the guest has no net with the name "52:54:00:00:00:03"`}},
		{specs(here("path=/x,for=swap"), conf("path=/y"), nic("tap=t")), []string{`disk /x: the guest has no disk with the name "swap"`}},
		{specs(here("path=/x,for=root"), here("path=/y,for=root"), nic("tap=t")), []string{`two are given for "root"`}},
		{specs(conf("path=/x,readonly,id=other,queues=3"), conf("path=/y")),
			[]string{"disk /x: readonly is the guest's", "disk /x: id is the guest's", "disk /x: queues is the guest's"}},
	} {
		err := move(guest(), c.here, Kinds(), true)
		for _, says := range c.says {
			if err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("error %v, want %q in it", err, says)
			}
		}
	}
}

// TestRelativePaths: a relative path is a file of the process that was given it, and
// absolute once the spec has entered. One that a source has sent means nothing here.
func TestRelativePaths(t *testing.T) {
	t.Chdir(t.TempDir())
	dir, err := os.Getwd()
	check(t, err)
	image := func(path string) *blk.Spec { return &blk.Spec{Config: blk.Config{Path: path}} }

	own := specs(image("a.img"), image(".//link/../b"), image("/c/../d"), socket(0, "./@v"))
	check(t, MakeAbsolute(own))
	guest := specs(image("/there"), socket(77, "/there.sock"))
	check(t, move(guest, specs(image("a.img"), socket(0, "v")), Kinds(), true))
	for _, c := range []struct {
		spec virtio.Spec
		want string
	}{
		{own[0], dir + "/a.img"}, {own[1], dir + "/link/../b"}, {own[2], "/c/../d"}, {own[3], dir + "/@v"},
		{guest[0], dir + "/a.img"}, {guest[1], dir + "/v"},
	} {
		if got := pathOf(c.spec); got != c.want {
			t.Errorf("%T: %q, want %q", c.spec, got, c.want)
		}
	}
	for _, c := range []struct{ sent, here virtio.Spec }{{image("a.img"), image("/a.img")}, {socket(77, "v"), socket(0, "/v")}} {
		if err := move(specs(c.sent), nil, Kinds(), true); err == nil || !strings.Contains(err.Error(), "expected an absolute path from the source") {
			t.Errorf("a relative path from a source: %v", err)
		}
		check(t, move(specs(c.sent), specs(c.here), Kinds(), true))
	}
}

func pathOf(s virtio.Spec) string {
	if d, ok := s.(*blk.Spec); ok {
		return d.Path
	}
	return s.(*vsock.Spec).Path
}

// toy is the spec of a device whose kind is not built in.
type toy struct{ inUse []string }

func (toy) Kind() string              { return "toy" }
func (toy) Validate() error           { return nil }
func (toy) String() string            { return "toy" }
func (t toy) FeaturesInUse() []string { return t.inUse }
func (toy) Open(*slog.Logger) (virtio.Backend, error) {
	return nil, errors.ErrUnsupported
}

// TestDecodeSpecRefuses: a destination names what it does not know, in one line.
func TestDecodeSpecRefuses(t *testing.T) {
	encode := func(devices ...virtio.Spec) []byte {
		s := aSpec()
		s.Devices = devices
		b, err := s.encode(nil)
		check(t, err)
		return b
	}
	newer := func(features ...string) []byte {
		b, err := cbor.Marshal(map[string]any{"version": SpecVersion, "features": features, "sockets": 4})
		check(t, err)
		return b
	}
	for _, c := range []struct {
		name string
		spec []byte
		says string
	}{
		{"kind", encode(toy{}), `device of kind "toy": this govmm does not know it`},
		{"feature of a device", encode(toy{inUse: []string{"wheels"}}), `the guest uses features that this version of govmm does not know: "toy/wheels"`},
		{"features", newer("sockets", "disk/discard"), `the guest uses features that this version of govmm does not know: "sockets", "disk/discard"`},
		{"many features", newer(slices.Repeat([]string{"x"}, 4000)...), `the guest uses features that this version of govmm does not know: ` + strings.Repeat(`"x", `, 8) + `and 3992 more`},
		{"long feature", newer(strings.Repeat("x", 5000)), `the guest uses features that this version of govmm does not know: "` + strings.Repeat("x", 60) + `"`},
		{"disk twice", encode(disk("/a"), disk("/b"), disk("/a")), "disk /a: it is given twice"},
		{"two balloons", encode(&balloon.Spec{}, &balloon.Spec{}), "more than 1 devices of kind balloon"},
	} {
		if _, err := decodeSpec(c.spec, nil); err == nil || err.Error() != c.says {
			t.Errorf("%s: error %v, want %q", c.name, err, c.says)
		}
	}
	var many []virtio.Spec
	for range maxDevices + 1 {
		many = append(many, &balloon.Spec{})
	}
	if _, err := decodeSpec(encode(many...), nil); err == nil || !strings.Contains(err.Error(), "32 devices: the bus has room for 31") {
		t.Errorf("too many devices: %v", err)
	}
	if _, err := decodeSpec(newer(), nil); err == nil || strings.Contains(err.Error(), "features") {
		t.Errorf("an unknown field without a feature: %v", err)
	}

	kind := virtio.Kind{Name: "toy", New: func() virtio.Spec { return new(toy) }, Features: []string{"wheels"}}
	if _, err := decodeSpec(encode(toy{inUse: []string{"wheels"}}), []virtio.Kind{kind}); err != nil {
		t.Errorf("a host that knows the kind and the feature: %v", err)
	}
	if _, err := decodeSpec(encode(toy{inUse: []string{"wings", "wheels"}}), []virtio.Kind{kind}); err == nil || !strings.HasSuffix(err.Error(), `know: "toy/wings"`) {
		t.Errorf("a host that knows one of two features: %v", err)
	}
}

// TestKindNameTaken: a program's kind of device cannot have the name of another.
func TestKindNameTaken(t *testing.T) {
	errs := validateDevices(nil, append(Kinds(), virtio.Kind{Name: "disk"}))
	if len(errs) != 1 || errs[0].Error() != `kind of device "disk": the name is taken` {
		t.Errorf("%v", errs)
	}
	if errs := validateDevices(nil, Kinds()); errs != nil {
		t.Errorf("the built-in kinds: %v", errs)
	}
}

// TestDevicesOfKinds: the devices stand in the order of the table, and each has its
// entry of the table.
func TestDevicesOfKinds(t *testing.T) {
	m := fromSpec(t, allDevices(t, vmtest.Image(t, "a.img", 1<<20)), nil)
	var kinds []string
	for _, d := range m.Devices() {
		kinds = append(kinds, d.Kind.Name)
	}
	if got := strings.Join(kinds, " "); got != "balloon rng console disk" {
		t.Errorf("devices %s", got)
	}
}

// TestNothingIsOpenedThatWasNotGiven: a guest that needs what this host did not give is
// refused before anything is opened, also if a part of it was given, and the error names
// each flag, with as much of the peer's words as fits a line.
func TestNothingIsOpenedThatWasNotGiven(t *testing.T) {
	long := strings.Repeat("/x", 2000)
	guest := func() []virtio.Spec {
		two, err := net.Kind.Parse("tap=tap2,mac=52:54:00:00:00:02")
		check(t, err)
		return specs(&balloon.Spec{}, disk("/a"), disk(long), disk("/c"), disk("/d"), disk("/e"), two, socket(7, "/v"))
	}
	const needs = "this guest needs what this host does not give to every guest: "
	disks := "--disk (5 times: for disk /a, disk " + long[:95] + ", disk /c, disk /d, and 1 more)"
	for _, c := range []struct {
		here []virtio.Spec
		want string
	}{
		{nil, needs + disks + ", --net (for net 52:54:00:00:00:02), --vsock (for vsock cid 7)"},
		{specs(socket(0, "/here")), needs + disks + ", --net (for net 52:54:00:00:00:02)"},
		{specs(disk("/one")), "disk: expected 5 as at the source, 1 given on this host\n" + needs + "--net (for net 52:54:00:00:00:02), --vsock (for vsock cid 7)"},
	} {
		if err := move(guest(), c.here, Kinds(), false); err == nil || err.Error() != c.want {
			t.Errorf("error %v, want %s", err, c.want)
		}
	}
	check(t, move(specs(&balloon.Spec{}), nil, Kinds(), false))

	// A kind of the user's own that names something of the host and cannot move.
	mine := append(Kinds(), virtio.Kind{Name: "mine"})
	if err := move(specs(rooted{}), nil, mine, false); err == nil || err.Error() != needs+"--mine (for mine /)" {
		t.Errorf("error %v", err)
	}
}

// rooted is a device that has a path and no way to another host.
type rooted struct{ virtio.Spec }

func (rooted) Kind() string        { return "mine" }
func (rooted) String() string      { return "mine /" }
func (rooted) MakeAbsolute() error { return nil }
