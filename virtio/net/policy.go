package net

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/govmm/govmm/virtio/limit"
)

// Policy is what a host lets a guest do on its network. It belongs to the host: it does
// not travel, and the guest is not told of it.
type Policy struct {
	// Limit is how many bytes a second pass, in each direction.
	Limit limit.Rates
	// Antispoof lets only those frames of the guest pass that are its own: from the
	// device's MAC address, which the guest cannot change then, and, if IPs is not empty,
	// from these addresses.
	Antispoof bool
	// IPs are the guest's addresses, or networks of which it may use any, at most
	// [MaxIPs].
	IPs []netip.Prefix
}

// MaxIPs is how many addresses a [Policy] may have.
const MaxIPs = 32

// policyOptions are the options that make a Policy.
var policyOptions = []string{"bps", "bps-burst", "antispoof", "ip"}

// set sets one option.
func (p *Policy) set(key, value string) (err error) {
	switch key {
	case "antispoof":
		p.Antispoof = true
	case "ip":
		ip, err := parseIP(value)
		if err != nil {
			return fmt.Errorf("ip=%s: %w", value, err)
		}
		p.IPs = append(p.IPs, ip)
	default:
		_, err = p.Limit.Set(key, value)
	}
	return err
}

// parseIP reads an address, or a network.
func parseIP(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		a, err := netip.ParseAddr(s)
		if err != nil || a.Zone() != "" {
			return p, fmt.Errorf("expected an IPv4 or IPv6 address, or a network such as fd00:1::/64")
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	if a := p.Addr(); p.Bits() == 0 || p != p.Masked() || a.IsUnspecified() || a.IsMulticast() || a.Is4In6() {
		return p, fmt.Errorf("expected an address of a single station, or a network without bits of a station, such as fd00:1::/64")
	}
	return p, nil
}

// validate reports the first invalid value.
func (p Policy) validate() error {
	switch {
	case len(p.IPs) > 0 && !p.Antispoof:
		return fmt.Errorf("ip= needs antispoof")
	case len(p.IPs) > MaxIPs:
		return fmt.Errorf("expected at most %d addresses, got %d", MaxIPs, len(p.IPs))
	}
	for _, ip := range p.IPs {
		if _, err := parseIP(ip.String()); err != nil {
			return fmt.Errorf("ip=%s: %w", ip, err)
		}
	}
	return p.Limit.Validate()
}

// String is the options from which set makes p, with a comma before each.
func (p Policy) String() string {
	s := p.Limit.String()
	if p.Antispoof {
		s += ",antispoof"
	}
	for _, ip := range p.IPs {
		s += ",ip=" + ip.String()
	}
	return s
}

// describe is the policy for people; "" if everything is allowed.
func (p Policy) describe() string {
	var all []string
	if limit := p.Limit.Describe(); limit != "" {
		all = append(all, limit+" each way")
	}
	if p.Antispoof {
		own := "only from its MAC address"
		for i, ip := range p.IPs {
			own += []string{" and ", ", "}[min(i, 1)] + strings.TrimSuffix(strings.TrimSuffix(ip.String(), "/32"), "/128")
		}
		all = append(all, own)
	}
	return strings.Join(all, ", ")
}
