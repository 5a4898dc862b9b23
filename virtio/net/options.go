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
	// Tap is the host's interface; if empty, a new one, govmm0 and so on, unless one of
	// Socket, User and Macvtap is set.
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
	// Renewed says that MAC is another one than that of the saved state, which is a copy's.
	Renewed bool `cbor:"-"`
	// Policy is this host's and does not travel.
	Policy Policy `cbor:"-"`

	// Socket is the path of a unix socket at which another process, such as passt or
	// gvproxy, takes and sends frames.
	Socket string `cbor:"socket,omitzero"`
	// User is a network in a process of its own, for which no privilege is needed.
	User bool `cbor:"user,omitzero"`
	// UserNet is how this host makes it, and does not travel.
	UserNet UserNet `cbor:"-"`
	// Macvtap is an interface of the host on which a macvtap is made, or a macvtap.
	Macvtap string `cbor:"macvtap,omitzero"`
	// Name is that of a macvtap that is made; if empty, govmm0 and so on.
	Name string `cbor:"-"`

	macvtap *macvtap // by Prepare
}

// ways are the ways to a network: the first option, and what may follow it beside mac, mtu,
// queues and the options of a [Policy].
var ways = []struct {
	name    string
	valued  bool // NAME= must follow
	options []string
}{
	{"tap", false, []string{"bridge", "owner"}},
	{"user", false, []string{"forward", "host"}},
	{"socket", true, nil},
	{"macvtap", true, []string{"name"}},
}

// ParseOptions reads `tap[=NAME][,bridge=NAME][,owner=USER]`, `user[,forward=...]...[,host]`,
// `socket=PATH` or `macvtap=LINK[,name=NAME]`, with `[,mac=ADDRESS][,mtu=BYTES][,queues=N]` and the options
// of a [Policy]. Without a MAC address a random one is chosen, with QEMU's and KVM's prefix.
func ParseOptions(s string) (Options, error) {
	o, err := parse(s, "mac", "mtu", "queues")
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

// ParseHostOptions reads what ParseOptions does, without mtu and queues: the host's side of a
// device whose other options a guest brings along. The address is the one that the guest
// must have; zero: any.
func ParseHostOptions(s string) (Options, error) {
	o, err := parse(s, "mac")
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

// parse reads the way to the network, the options that are known, those of the way, and
// those of a Policy.
func parse(s string, known ...string) (Options, error) {
	o := Options{Queues: 1}
	fields := strings.Split(s, ",")
	first, name, named := strings.Cut(fields[0], "=")
	at := slices.IndexFunc(ways, func(w struct {
		name    string
		valued  bool
		options []string
	}) bool {
		return w.name == first
	})
	switch {
	case at < 0:
		return o, fmt.Errorf("the first item must be tap or tap=NAME, user, socket=PATH, or macvtap=LINK")
	case name == "" && (named || ways[at].valued):
		return o, fmt.Errorf("%s has no value", first)
	case named && first == "user":
		return o, fmt.Errorf("user has no value")
	}
	switch first {
	case "tap":
		o.Tap = name
	case "user":
		o.User = true
	case "socket":
		o.Socket = name
	case "macvtap":
		o.Macvtap = name
	}
	known = append(append(known, ways[at].options...), policyOptions...)
	seen := map[string]bool{}
	for _, field := range fields[1:] {
		key, value, given := strings.Cut(field, "=")
		flag := key == "antispoof" || key == "host"
		switch {
		case !slices.Contains(known, key):
			return o, fmt.Errorf("%q is not one of %s, which %s has", key, strings.Join(known, ", "), first)
		case seen[key] && key != "ip" && key != "forward":
			return o, fmt.Errorf("%s is given twice", key)
		case given && flag:
			return o, fmt.Errorf("%s has no value: it is given or not", key)
		case value == "" && !flag:
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
	case "bridge":
		o.Bridge = value
	case "name":
		o.Name = value
	case "forward", "host":
		err = o.UserNet.set(key, value)
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

// way is the way to the network.
func (o Options) way() string {
	switch {
	case o.User:
		return "user"
	case o.Socket != "":
		return "socket=" + o.Socket
	case o.Macvtap != "":
		return "macvtap=" + o.Macvtap
	case o.Tap != "":
		return "tap=" + o.Tap
	}
	return "tap"
}

// String is the options as ParseOptions reads them.
func (o Options) String() string {
	s := o.way() + o.UserNet.String()
	if o.Bridge != "" {
		s += ",bridge=" + o.Bridge
	}
	if o.Name != "" {
		s += ",name=" + o.Name
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
	for _, name := range []string{o.Tap, o.Bridge, o.Macvtap, o.Name} {
		if name != "" && !validInterface(name) {
			return fmt.Errorf("interface %q: not a name, 1 to 15 characters without %%, : and /", name)
		}
	}
	ways := 0
	for _, given := range []bool{o.Tap != "" || o.Bridge != "" || o.Owner != nil, o.Socket != "", o.User, o.Macvtap != ""} {
		if given {
			ways++
		}
	}
	switch {
	case ways > 1:
		return fmt.Errorf("expected one of tap, user, socket and macvtap, got %d", ways)
	case o.Macvtap == "" && o.Name != "":
		return fmt.Errorf("name is of a macvtap")
	case !o.User && !o.UserNet.isZero():
		return fmt.Errorf("forward and host are of a user network")
	case o.User && o.MTU > maxUserMTU:
		return fmt.Errorf("the MTU of a user network must be at most %d, got %d", maxUserMTU, o.MTU)
	case strings.ContainsRune(o.Socket, 0):
		return fmt.Errorf("socket %q: not a path", o.Socket)
	case !o.MAC.valid():
		return fmt.Errorf("MAC address %s: not one of a single station", o.MAC)
	case o.MTU != 0 && o.MTU < minMTU:
		return fmt.Errorf("the MTU must be at least %d, got %d", minMTU, o.MTU)
	case o.Queues < 1 || o.Queues > MaxQueuePairs:
		return fmt.Errorf("queue pairs must be between 1 and %d, got %d", MaxQueuePairs, o.Queues)
	}
	if err := o.UserNet.validate(); err != nil {
		return err
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
