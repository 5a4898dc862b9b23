package machine

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/pci"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/console"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/virtio/rng"
	"github.com/govmm/govmm/virtio/vsock"
)

// Kinds is the table of the built-in kinds of devices, in the order in which
// their devices stand on the PCI bus. This is where a virtio device is added.
func Kinds() []virtio.Kind {
	return []virtio.Kind{
		balloon.Kind,
		rng.Kind,
		console.Kind,
		blk.Kind,
		blk.SeedKind,
		net.Kind,
		vsock.Kind,
	}
}

// kindOf returns the entry of a name in a table.
func kindOf(kinds []virtio.Kind, name string) (virtio.Kind, bool) {
	i := slices.IndexFunc(kinds, func(k virtio.Kind) bool { return k.Name == name })
	if i < 0 {
		return virtio.Kind{}, false
	}
	return kinds[i], true
}

// maxDevices is how many devices there is room for beside the host bridge.
const maxDevices = pci.Slots - 1

// sorted returns the devices in the order of the table: that of the PCI bus.
func sorted(devices []virtio.Spec, kinds []virtio.Kind) []virtio.Spec {
	var out []virtio.Spec
	for _, k := range kinds {
		for _, d := range devices {
			if d.Kind() == k.Name {
				out = append(out, d)
			}
		}
	}
	return out
}

// MakeAbsolute makes the paths of this host in the specs absolute.
func MakeAbsolute(devices []virtio.Spec) error {
	var errs []error
	for _, d := range devices {
		if p, ok := d.(virtio.Pathed); ok {
			errs = append(errs, p.MakeAbsolute())
		}
	}
	return errors.Join(errs...)
}

// validateDevices lists what no host could make devices from.
func validateDevices(devices []virtio.Spec, kinds []virtio.Kind) (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if n := len(devices); n > maxDevices {
		bad("%d devices: the bus has room for %d", n, maxDevices)
	}
	for i, k := range kinds {
		if first, _ := kindOf(kinds[:i], k.Name); first.Name == k.Name {
			bad("kind of device %.40q: the name is taken", k.Name)
		}
	}
	count := map[string]int{}
	names := map[string]bool{}
	for _, d := range devices {
		k, ok := kindOf(kinds, d.Kind())
		if !ok {
			bad("device of kind %.40q: this govmm does not know it", d.Kind())
			continue
		}
		if err := d.Validate(); err != nil {
			errs = append(errs, err)
		}
		if count[k.Name]++; k.Max > 0 && count[k.Name] == k.Max+1 {
			bad("more than %d devices of kind %s", k.Max, k.Name)
		}
		if e, ok := d.(virtio.Exclusive); ok {
			for _, what := range e.Uses() {
				if names[what] {
					bad("%s: it is given twice", what)
				}
				names[what] = true
			}
		}
	}
	return errs
}

// move adapts the devices of a guest that has come to this host. here are those that
// name something of it. Where there are none of a kind, the guest is refused, and the
// error lists all that it needs; with trust, the names are those of the source.
func move(devices, here []virtio.Spec, kinds []virtio.Kind, trust bool) error {
	var errs []error
	var needs []string
	for _, k := range kinds {
		ofKind := func(d virtio.Spec) bool { return d.Kind() != k.Name }
		guest, given := slices.DeleteFunc(slices.Clone(devices), ofKind), slices.DeleteFunc(slices.Clone(here), ofKind)
		if len(given) > 0 && len(given) != len(guest) {
			errs = append(errs, kind.Told(fmt.Errorf("%s: expected %d as at the source, %d given on this host", k.Name, len(guest), len(given))))
			continue
		}
		if len(given) == 0 && !trust {
			if names := slices.DeleteFunc(guest, usesNothing); len(names) > 0 {
				needs = append(needs, need(k.Name, names))
			}
			continue
		}
		if len(given) > 0 {
			var err error
			if given, err = inOrder(guest, given); err != nil {
				errs = append(errs, kind.Hidden(err, "%s: this host gives devices by names that the guest's do not have", k.Name))
				continue
			}
		}
		for i, d := range guest {
			m, ok := d.(virtio.Mover)
			if !ok {
				continue
			}
			name := peersName(d) // before it is this host's
			var h virtio.Spec
			if len(given) > 0 {
				h = given[i]
			}
			if err := m.Move(h); err != nil {
				errs = append(errs, kind.Hidden(err, "%s: this host does not give the guest what it knows", name))
			}
		}
	}
	if needs != nil {
		errs = append(errs, kind.Told(fmt.Errorf("this guest needs what this host does not give to every guest: %s", strings.Join(needs, ", "))))
	}
	return errors.Join(errs...)
}

// renew gives devices another identity: of here, those of the same kind and number.
func renew(devices, here []virtio.Spec) {
	number := map[string]int{}
	for _, d := range devices {
		n := number[d.Kind()]
		number[d.Kind()]++
		r, ok := d.(virtio.Renewer)
		if !ok {
			continue
		}
		var with virtio.Spec
		for _, h := range here {
			if h.Kind() == d.Kind() {
				if n == 0 {
					with = h
				}
				n--
			}
		}
		r.Renew(with)
	}
}

// inOrder returns what this host gives in the order of the guest's devices: by name where
// one is given, the others one after another.
func inOrder(guest, given []virtio.Spec) ([]virtio.Spec, error) {
	out := make([]virtio.Spec, len(guest))
	var rest []virtio.Spec
	for _, h := range given {
		n, ok := h.(virtio.Named)
		name := ""
		if ok {
			name = n.ForDevice()
		}
		if name == "" {
			rest = append(rest, h)
			continue
		}
		i := slices.IndexFunc(guest, func(g virtio.Spec) bool { return g.(virtio.Named).DeviceName() == name })
		switch {
		case i < 0:
			return nil, fmt.Errorf("%s: the guest has no %s with the name %q", h, h.Kind(), name)
		case out[i] != nil:
			return nil, fmt.Errorf("%s: two are given for %q", h.Kind(), name)
		}
		out[i] = h
	}
	for i := range out {
		if out[i] == nil {
			out[i], rest = rest[0], rest[1:]
		}
	}
	return out, nil
}

// usesNothing says that a device needs nothing of its host that has a name there.
func usesNothing(d virtio.Spec) bool {
	switch d.(type) {
	case virtio.Mover, virtio.Pathed, virtio.Exclusive:
		return false
	}
	return true
}

// need names the flag that gives devices of a kind what they need of this host.
func need(flag string, devices []virtio.Spec) string {
	const most = 4 // of what a peer wrote, in one line
	var names []string
	for i, d := range devices {
		if i == most {
			names = append(names, fmt.Sprintf("and %d more", len(devices)-most))
			break
		}
		names = append(names, peersName(d))
	}
	if len(devices) == 1 {
		return fmt.Sprintf("--%s (for %s)", flag, names[0])
	}
	return fmt.Sprintf("--%s (%d times: for %s)", flag, len(devices), strings.Join(names, ", "))
}

// peersName is a device's name at the source.
func peersName(d virtio.Spec) string { return fmt.Sprintf("%.100s", d) }

// UsesHost says that a device needs something of its host that has a name there: a file, a
// tap, a socket.
func UsesHost(d virtio.Spec) bool { return !usesNothing(d) }
