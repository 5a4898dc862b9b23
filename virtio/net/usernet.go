package net

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// UserNet is what a host lets the world and the guest do by way of a user network. It
// belongs to the host: it does not travel.
type UserNet struct {
	// Forwards are ports of the host that lead to ports of the guest, at most
	// [MaxForwards].
	Forwards []Forward `json:"forwards,omitempty"`
	// Host lets the guest reach services of the host's loopback address 127.0.0.1, at
	// 192.168.127.254.
	Host bool `json:"host,omitempty"`

	start *starter // by Prepare
}

// Forward is a port of the host that leads to one of the guest.
type Forward struct {
	UDP   bool           `json:"udp,omitempty"` // otherwise TCP
	Host  netip.AddrPort `json:"host"`
	Guest uint16         `json:"guest"`
}

const (
	// MaxForwards is how many forwards a network may have.
	MaxForwards = 64
	// maxUserMTU is passt's largest, too: what fits a packet of IPv4, as multiple of 8.
	maxUserMTU = 65520
	// userMTU is the MTU of the guest's link if nothing else is said.
	userMTU = 1500
)

// set sets one option.
func (u *UserNet) set(key, value string) error {
	if key == "host" {
		u.Host = true
		return nil
	}
	f, err := parseForward(value)
	if err != nil {
		return fmt.Errorf("forward=%s: %w", value, err)
	}
	u.Forwards = append(u.Forwards, f)
	return nil
}

// parseForward reads [udp:|tcp:][ADDRESS:]PORT:GUESTPORT.
func parseForward(s string) (f Forward, err error) {
	if rest, ok := strings.CutPrefix(s, "udp:"); ok {
		f.UDP, s = true, rest
	} else {
		s = strings.TrimPrefix(s, "tcp:")
	}
	at := strings.LastIndex(s, ":")
	if at < 0 {
		return f, errors.New("expected [ADDRESS:]PORT:GUESTPORT, as in 2222:22 or udp:127.0.0.1:5353:53")
	}
	address, port := netip.AddrFrom4([4]byte{127, 0, 0, 1}), s[:at]
	if i := strings.LastIndex(port, ":"); i >= 0 {
		text := strings.TrimSuffix(strings.TrimPrefix(port[:i], "["), "]")
		if address, err = netip.ParseAddr(text); err != nil || address.Zone() != "" || address.IsMulticast() || address.Is4In6() {
			return f, fmt.Errorf("expected an IPv4 address of this host, or an IPv6 address in brackets, found %.80q", port[:i])
		}
		port = port[i+1:]
	}
	host, err := parsePort(port)
	if err == nil {
		f.Guest, err = parsePort(s[at+1:])
	}
	f.Host = netip.AddrPortFrom(address, host)
	return f, err
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%.80q: expected a port between 1 and 65535", s)
	}
	return uint16(n), nil
}

// String is the forward as parseForward reads it.
func (f Forward) String() string {
	s := fmt.Sprintf("%s:%d", f.Host, f.Guest)
	if f.UDP {
		s = "udp:" + s
	}
	return s
}

// String is the options from which set makes u, with a comma before each.
func (u UserNet) String() (s string) {
	for _, f := range u.Forwards {
		s += ",forward=" + f.String()
	}
	if u.Host {
		s += ",host"
	}
	return s
}

func (u UserNet) isZero() bool { return len(u.Forwards) == 0 && !u.Host }

// validate reports the first forward that makes no sense.
func (u UserNet) validate() error {
	if len(u.Forwards) > MaxForwards {
		return fmt.Errorf("expected at most %d forwards, got %d", MaxForwards, len(u.Forwards))
	}
	for i, f := range u.Forwards {
		again, err := parseForward(f.String())
		if err != nil || again != f {
			return fmt.Errorf("forward=%s: not a forward", f)
		}
		if slices.ContainsFunc(u.Forwards[:i], func(g Forward) bool { return g.UDP == f.UDP && g.Host == f.Host }) {
			return fmt.Errorf("forward=%s: another one has this port of the host", f)
		}
	}
	return nil
}

// UserNetConfig is what the process of a user network is told when it is started: as JSON,
// in its last argument.
type UserNetConfig struct {
	UserNet
	// Sandbox is the mode of its sandbox, see package vmm/sandbox.
	Sandbox string `json:"sandbox,omitempty"`
}

// ParseUserNetConfig reads the argument.
func ParseUserNetConfig(s string) (c UserNetConfig, err error) {
	d := json.NewDecoder(strings.NewReader(s))
	d.DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return c, fmt.Errorf("user network %.80q: %w", s, err)
	}
	return c, c.validate()
}
