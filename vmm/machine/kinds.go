package machine

import (
	"errors"
	"fmt"
	"slices"

	"github.com/govmm/govmm/balloon"
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

// move adapts the devices of a guest that has come to this host. here are those
// that name something of it; where there are none of a kind, the names are those
// of the source.
func move(devices, here []virtio.Spec, kinds []virtio.Kind) error {
	var errs []error
	for _, k := range kinds {
		ofKind := func(d virtio.Spec) bool { return d.Kind() != k.Name }
		guest, given := slices.DeleteFunc(slices.Clone(devices), ofKind), slices.DeleteFunc(slices.Clone(here), ofKind)
		if len(given) > 0 && len(given) != len(guest) {
			errs = append(errs, fmt.Errorf("%s: expected %d as at the source, %d given on this host", k.Name, len(guest), len(given)))
			continue
		}
		for i, d := range guest {
			m, ok := d.(virtio.Mover)
			if !ok {
				continue
			}
			var h virtio.Spec
			if len(given) > 0 {
				h = given[i]
			}
			if err := m.Move(h); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
