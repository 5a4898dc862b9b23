package net_test

import (
	"encoding/binary"
	stdnet "net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/testenv"
	"github.com/govmm/govmm/virtio/net"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A router advertisement of the guest gives the host addresses and routes by a tap that
// the user has made, which stays as it is, and nothing by one that govmm makes.
func TestTapKeepsIPv6Away(t *testing.T) {
	namespace(t)
	const settings = "/proc/sys/net/ipv6/conf/"
	if _, err := os.Stat(settings + "default/accept_ra"); err != nil {
		t.Skip("SKIPPED: no IPv6 in this kernel")
	}
	for name, value := range map[string]string{"disable_ipv6": "0", "accept_ra": "2", "autoconf": "1", "accept_dad": "0"} {
		check(t, os.WriteFile(settings+"default/"+name, []byte(value), 0))
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "users"
	users := &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR}
	check(t, netlink.LinkAdd(users))

	guest := net.MAC{0x52, 0x54, 0, 1, 2, 3}
	ra := routerAdvertisement(guest, netip.MustParseAddr("fe80::5054:ff:fe01:203"), netip.MustParseAddr("2001:db8:77::"))
	taps := map[string]*net.Tap{"users": openTap(t, "tap=users"), "made": openTap(t, "tap=made")}
	for _, tap := range taps {
		defer func() { check(t, tap.Close()) }()
	}
	has := func(name string) (addresses, routes int) {
		t.Helper()
		link, err := netlink.LinkByName(name)
		check(t, err)
		all, err := netlink.AddrList(link, netlink.FAMILY_V6)
		check(t, err)
		ways, err := netlink.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{LinkIndex: link.Attrs().Index, Table: unix.RT_TABLE_UNSPEC},
			netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
		check(t, err)
		return len(all), len(ways)
	}
	learnt := func() bool {
		link, err := netlink.LinkByName("users")
		check(t, err)
		all, err := netlink.AddrList(link, netlink.FAMILY_V6)
		check(t, err)
		for _, a := range all {
			if strings.HasPrefix(a.IP.String(), "2001:db8:77:") {
				return true
			}
		}
		return false
	}
	for end := time.Now().Add(testenv.Patience); !learnt(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the host takes no advertisement, so this shows nothing")
		}
		for _, name := range []string{"made", "users"} { // the one that must not hear it first
			check(t, taps[name].Ports()[0].Write(ra))
		}
	}
	if addresses, routes := has("made"); addresses != 0 || routes != 0 {
		t.Errorf("the host has %d addresses and %d routes by the tap that govmm made", addresses, routes)
	}

	// Also after a user has turned IPv6 on again.
	check(t, os.WriteFile(settings+"made/disable_ipv6", []byte("0"), 0))
	check(t, taps["made"].Ports()[0].Write(ra))
	check(t, taps["users"].Ports()[0].Write(ra))
	link, err := netlink.LinkByName("made")
	check(t, err)
	for end := time.Now().Add(testenv.Patience); received(t, "made") < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s has got %d frames", link.Attrs().Name, received(t, "made"))
		}
	}
	if addresses, _ := has("made"); addresses != 0 {
		t.Errorf("the host has got %d addresses from the guest", addresses)
	}
}

// received is how many frames the host has got by an interface.
func received(t *testing.T, name string) uint64 {
	t.Helper()
	link, err := netlink.LinkByName(name)
	check(t, err)
	return link.Attrs().Statistics.RxPackets
}

// routerAdvertisement is one from a guest, to all nodes (RFC 4861, 4.2 and 4.6.2), behind an
// empty header.
func routerAdvertisement(mac net.MAC, from, prefix netip.Addr) []byte {
	icmp := []byte{134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0}
	icmp = append(icmp, 3, 4, 64, 0xc0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) // on-link, autonomous
	icmp = append(icmp, prefix.AsSlice()...)
	to := netip.MustParseAddr("ff02::1")
	sum := uint32(len(icmp)) + icmp6
	for _, b := range [][]byte{from.AsSlice(), to.AsSlice(), icmp} {
		for i := 0; i < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(icmp[2:], ^uint16(sum>>16+sum))
	packet := ip6(from.String(), icmp6, icmp...)
	packet[7] = 255
	p := eth(mac, ipv6, packet)
	copy(p[net.HeaderBytes:], stdnet.HardwareAddr{0x33, 0x33, 0, 0, 0, 1})
	return p
}
