package usernet

import (
	"bufio"
	"io"
	"net/netip"
	"strings"
)

// maxServers is how many name servers are asked, as in resolv.conf(5).
const maxServers = 3

// Servers reads the name servers of a file like /etc/resolv.conf.
func Servers(r io.Reader) (servers []netip.AddrPort) {
	lines := bufio.NewScanner(io.LimitReader(r, 64<<10))
	for lines.Scan() && len(servers) < maxServers {
		words := strings.Fields(lines.Text())
		if len(words) < 2 || words[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(words[1]); err == nil {
			servers = append(servers, netip.AddrPortFrom(a, dnsPort))
		}
	}
	return servers
}
