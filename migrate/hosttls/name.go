package hosttls

import (
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// maxName is the longest DNS name (RFC 1035, section 2.3.4).
const maxName = 253

// isDNSName reports whether s is the name of one host. Underscores are taken, as in
// names that hosts have in practice; wildcards are not.
func isDNSName(s string) bool {
	if s == "" || len(s) > maxName {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, c := range []byte(label) {
			if (c|0x20 < 'a' || c|0x20 > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return false
			}
		}
	}
	// All digits in the last label: an address that is none.
	return strings.Trim(s[strings.LastIndexByte(s, '.')+1:], "0123456789") != ""
}

// ServerName returns the name that the certificate of the destination at address must
// carry: override, or if that is empty the host in address, which is HOST:PORT.
func ServerName(address, override string) (string, error) {
	name := override
	if name == "" {
		host, _, err := net.SplitHostPort(address)
		if err != nil || strings.HasPrefix(address, "unix:") {
			return "", fmt.Errorf("%.80q has no host name that the destination's certificate could carry: --tls-server-name NAME says which", address)
		}
		name, _, _ = strings.Cut(host, "%") // an IPv6 zone is this host's own matter
		name = strings.TrimSuffix(name, ".")
	}
	return name, checkServerName(name)
}

func checkServerName(name string) error {
	if _, err := netip.ParseAddr(name); err == nil && !strings.Contains(name, "%") || isDNSName(name) {
		return nil
	}
	return fmt.Errorf("server name %.80q: expected a DNS name or an IP address", name)
}

// Pattern is one value of --tls-allow: it says which names may hand over a guest.
type Pattern struct {
	name   string       // in lower case
	under  string       // ".DOMAIN" of *.DOMAIN
	prefix netip.Prefix // of addresses
}

// ParsePattern reads NAME, *.DOMAIN, ADDRESS or ADDRESS/BITS. *.DOMAIN stands for names
// with one label more than DOMAIN.
func ParsePattern(s string) (p Pattern, err error) {
	lower := strings.ToLower(s)
	domain, wild := strings.CutPrefix(lower, "*.")
	switch {
	case wild && isDNSName(domain):
		return Pattern{under: "." + domain}, nil
	case isDNSName(lower):
		return Pattern{name: lower}, nil
	}
	if p.prefix, err = netip.ParsePrefix(s); err == nil && p.prefix == p.prefix.Masked() && !p.prefix.Addr().Is4In6() {
		return p, nil
	}
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return Pattern{prefix: netip.PrefixFrom(a, a.BitLen())}, nil
	}
	return Pattern{}, fmt.Errorf("%.80q: expected a DNS name, *.DOMAIN, an IP address, or ADDRESS/BITS", s)
}

// allows reports whether one of the certificate's names matches. These are its DNS names
// and IP addresses (subjectAltName), never its common name. A wildcard in a certificate
// is the name of no host.
func (p Pattern) allows(c *x509.Certificate) bool {
	for _, ip := range c.IPAddresses {
		if a, ok := netip.AddrFromSlice(ip); ok && p.prefix.Contains(a.Unmap()) {
			return true
		}
	}
	for _, name := range c.DNSNames {
		name = strings.ToLower(name)
		if !isDNSName(name) {
			continue
		}
		host, under := strings.CutSuffix(name, p.under)
		if name == p.name || p.under != "" && under && !strings.Contains(host, ".") {
			return true
		}
	}
	return false
}

// namesOf lists a certificate's names for an error: a few, since it may have thousands.
func namesOf(c *x509.Certificate) string {
	var all []string
	for _, n := range c.DNSNames {
		if !isDNSName(n) {
			n = fmt.Sprintf("%.80q", n)
		}
		all = append(all, n)
	}
	for _, ip := range c.IPAddresses {
		all = append(all, ip.String())
	}
	const most = 4
	switch {
	case len(all) == 0:
		return "no host"
	case len(all) > most:
		all = append(all[:most], "...")
	}
	return strings.Join(all, ", ")
}
