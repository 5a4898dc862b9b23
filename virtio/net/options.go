package net

import (
	"crypto/rand"
	"fmt"
	"os/user"
	"slices"
	"strconv"
	"strings"
)

// Options is what `--net` says.
type Options struct {
	// Tap is the host's interface; if empty, a new one, govmm0 and so on.
	Tap string `cbor:"tap"`
	// Bridge is the bridge that the tap becomes a port of; if empty, the tap's
	// bridge does not change.
	Bridge string `cbor:"bridge"`
	// MAC is the guest's address.
	MAC MAC `cbor:"mac"`
	// MTU of the tap and of the guest's link; 0: the tap's own.
	MTU uint16 `cbor:"mtu"`
	// Queues is the number of queue pairs.
	Queues int `cbor:"queues"`
	// Owner is the user who gets a tap that is made, which then stays; nil: it
	// goes away with the VMM. It is a user of this host and does not travel.
	Owner *uint32 `cbor:"-"`
	// Arriving says that the guest comes from another host, where it was told the
	// MTU: an existing tap must have it, and is not changed for it.
	Arriving bool `cbor:"-"`
	// Policy is this host's and does not travel.
	Policy Policy `cbor:"-"`
}

// ParseOptions reads `tap[=NAME][,bridge=NAME][,mac=ADDRESS][,mtu=BYTES][,queues=N][,owner=USER]`
// and the options of a [Policy].
// Without a MAC address a random one is chosen, with QEMU's and KVM's prefix.
func ParseOptions(s string) (Options, error) {
	o, err := parse(s, "tap", "bridge", "mac", "mtu", "queues", "owner")
	if err == nil && o.MAC == (MAC{}) {
		o.MAC = randomMAC()
	}
	if err == nil {
		err = o.Validate()
	}
	if err != nil {
		return o, fmt.Errorf("net %q: %w", s, err)
	}
	return o, nil
}

// ParseHostOptions reads `tap[=NAME][,bridge=NAME][,mac=ADDRESS][,owner=USER]` and the
// options of a [Policy]: the host's side of a device whose other options a guest brings
// along. The address is the one that the guest must have; zero: any.
func ParseHostOptions(s string) (Options, error) {
	o, err := parse(s, "tap", "bridge", "mac", "owner")
	if err == nil {
		guest := o
		if guest.MAC == (MAC{}) {
			guest.MAC = randomMAC() // any will do
		}
		err = guest.Validate()
	}
	if err != nil {
		return o, fmt.Errorf("net %q: %w", s, err)
	}
	return o, nil
}

// parse reads the options that are known, and those of a Policy; the first is always tap.
func parse(s string, known ...string) (Options, error) {
	o := Options{Queues: 1}
	known = append(known, policyOptions...)
	seen := map[string]bool{}
	for i, field := range strings.Split(s, ",") {
		key, value, given := strings.Cut(field, "=")
		switch {
		case i == 0 && key != "tap":
			return o, fmt.Errorf("the first item must be tap or tap=NAME")
		case !slices.Contains(known, key):
			return o, fmt.Errorf("%q is not one of %s", key, strings.Join(known, ", "))
		case seen[key] && key != "ip":
			return o, fmt.Errorf("%s is given twice", key)
		case given && key == "antispoof":
			return o, fmt.Errorf("antispoof has no value: it is given or not")
		case value == "" && (given || key != "tap" && key != "antispoof"):
			return o, fmt.Errorf("%s has no value", key)
		}
		seen[key] = true
		if err := o.set(key, value); err != nil {
			return o, err
		}
	}
	return o, nil
}

// set sets one option.
func (o *Options) set(key, value string) (err error) {
	switch key {
	case "tap":
		o.Tap = value
	case "bridge":
		o.Bridge = value
	case "mac":
		o.MAC, err = ParseMAC(value)
	case "mtu":
		n, perr := strconv.ParseUint(value, 10, 16)
		if o.MTU = uint16(n); perr != nil || n < minMTU {
			err = fmt.Errorf("mtu=%s: must be between %d and 65535", value, minMTU)
		}
	case "queues":
		o.Queues, err = strconv.Atoi(value)
		if err != nil || o.Queues < 1 || o.Queues > MaxQueuePairs {
			err = fmt.Errorf("queues=%s: must be between 1 and %d", value, MaxQueuePairs)
		}
	case "owner":
		o.Owner, err = parseOwner(value)
	default:
		err = o.Policy.set(key, value)
	}
	return err
}

// String is the options as ParseOptions reads them.
func (o Options) String() string {
	s := "tap"
	if o.Tap != "" {
		s += "=" + o.Tap
	}
	if o.Bridge != "" {
		s += ",bridge=" + o.Bridge
	}
	s += ",mac=" + o.MAC.String()
	if o.MTU != 0 {
		s += fmt.Sprintf(",mtu=%d", o.MTU)
	}
	s += fmt.Sprintf(",queues=%d", o.Queues)
	if o.Owner != nil {
		s += fmt.Sprintf(",owner=%d", *o.Owner)
	}
	return s + o.Policy.String()
}

// Validate reports the first invalid option. It does not look at the host.
func (o Options) Validate() error {
	for _, name := range []string{o.Tap, o.Bridge} {
		if name != "" && !validInterface(name) {
			return fmt.Errorf("interface %q: not a name, 1 to 15 characters without %%, : and /", name)
		}
	}
	switch {
	case !o.MAC.valid():
		return fmt.Errorf("MAC address %s: not one of a single station", o.MAC)
	case o.MTU != 0 && o.MTU < minMTU:
		return fmt.Errorf("the MTU must be at least %d, got %d", minMTU, o.MTU)
	case o.Queues < 1 || o.Queues > MaxQueuePairs:
		return fmt.Errorf("queue pairs must be between 1 and %d, got %d", MaxQueuePairs, o.Queues)
	}
	return o.Policy.validate()
}

// validInterface is the kernel's dev_valid_name, without patterns.
func validInterface(s string) bool {
	return len(s) < 16 && s != "." && s != ".." && !strings.ContainsAny(s, "%/: \t\n\v\f\r\x00")
}

func parseOwner(s string) (*uint32, error) {
	id := s
	if _, err := strconv.ParseUint(s, 10, 32); err != nil {
		u, err := user.Lookup(s)
		if err != nil {
			return nil, fmt.Errorf("owner=%s: %w", s, err)
		}
		id = u.Uid
	}
	n, err := strconv.ParseUint(id, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("owner=%s: %w", s, err)
	}
	uid := uint32(n)
	return &uid, nil
}

func randomMAC() MAC {
	m := MAC{0x52, 0x54, 0x00}
	_, _ = rand.Read(m[3:]) // never fails
	return m
}
