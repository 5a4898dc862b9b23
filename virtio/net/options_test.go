package net_test

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"

	"github.com/govmm/govmm/virtio/limit"
	"github.com/govmm/govmm/virtio/net"
)

func TestParseOptions(t *testing.T) {
	uid := uint32(1000)
	for s, want := range map[string]net.Options{
		"tap,mac=52:54:00:01:02:03": {MAC: guestMAC, Queues: 1},
		"tap=tap0,bridge=br0,mac=52:54:00:01:02:03,mtu=9000,queues=4,owner=1000": {
			Tap: "tap0", Bridge: "br0", MAC: guestMAC, MTU: 9000, Queues: 4, Owner: &uid,
		},
		"tap,mac=52:54:00:01:02:03,bps=10M,bps-burst=1M": {MAC: guestMAC, Queues: 1, Policy: net.Policy{Limit: limit.Rates{BPS: 10 << 20, BPSBurst: 1 << 20}}},
		"tap,mac=52:54:00:01:02:03,antispoof,ip=10.0.0.2,ip=fd00:1::/64": {MAC: guestMAC, Queues: 1, Policy: net.Policy{Antispoof: true,
			IPs: []netip.Prefix{netip.MustParsePrefix("10.0.0.2/32"), netip.MustParsePrefix("fd00:1::/64")}}},
		"user,mac=52:54:00:01:02:03": {User: true, MAC: guestMAC, Queues: 1},
		"user,forward=2222:22,forward=udp:0.0.0.0:53:5353,forward=[::1]:80:8080,host,mac=52:54:00:01:02:03,mtu=65520": {User: true, MAC: guestMAC, Queues: 1, MTU: 65520, UserNet: net.UserNet{
			Host: true, Forwards: []net.Forward{{Host: netip.MustParseAddrPort("127.0.0.1:2222"), Guest: 22},
				{UDP: true, Host: netip.MustParseAddrPort("0.0.0.0:53"), Guest: 5353}, {Host: netip.MustParseAddrPort("[::1]:80"), Guest: 8080}}}},
		"socket=/run/passt.sock,mac=52:54:00:01:02:03,queues=2,antispoof": {Socket: "/run/passt.sock", MAC: guestMAC, Queues: 2, Policy: net.Policy{Antispoof: true}},
	} {
		got, err := net.ParseOptions(s)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
		if again, err := net.ParseOptions(got.String()); err != nil || !reflect.DeepEqual(again, got) {
			t.Errorf("%s: again %+v, %v", got, again, err)
		}
	}
	a, err := net.ParseOptions("tap")
	check(t, err)
	b, err := net.ParseOptions("tap,owner=root")
	check(t, err)
	if a.MAC == b.MAC || !strings.HasPrefix(a.MAC.String(), "52:54:00:") || b.Owner == nil || *b.Owner != 0 {
		t.Errorf("%+v, %+v", a, b)
	}
	for _, bad := range []string{
		"", "bridge=br0", "user=x", "user,bridge=br0", "user,owner=root", "user,forward", "user,forward=", "user,forward=22", "user,forward=0:22", "user,forward=1:65536",
		"user,forward=host:1:2", "user,forward=224.0.0.1:1:2", "user,forward=1:2,forward=127.0.0.1:1:3", "user,host=on", "user,host,host", "user,mtu=65521", "user,tap=a",
		"user" + strings.Repeat(",forward=1:2", net.MaxForwards+1), "tap,forward=1:2", "tap,host", "socket", "socket=", "socket=/a,bridge=b", "socket=/a,forward=1:2", "socket=/a\x00", "tap=", "tap=a,tap=b", "tap=sixteencharacter", "tap=a/b", "tap=tap%d", "tap=..", "tap,bridge", "tap,bridge=",
		"tap,mac=01:00:5e:00:00:01", "tap,mac=00:00:00:00:00:00", "tap,mac=1", "tap,mac=02:00:00:00:00:00:00:01",
		"tap,mtu=67", "tap,mtu=65536", "tap,mtu=-1", "tap,queues=0", "tap,queues=17", "tap,queues=two", "tap,owner=no-such-user", "tap,vhost=on", "tap,,",
		"tap,bps=0", "tap,bps-burst=1M", "tap,iops=1", "tap,bps=1,bps=1", "tap,antispoof=on", "tap,antispoof,antispoof", "tap,ip=10.0.0.1", "tap,antispoof,ip",
		"tap,antispoof,ip=", "tap,antispoof,ip=10.0.0.1/24", "tap,antispoof,ip=0.0.0.0", "tap,antispoof,ip=::/0", "tap,antispoof,ip=ff02::1",
		"tap,antispoof,ip=fe80::1%eth0", "tap,antispoof,ip=::ffff:10.0.0.1", "tap,antispoof" + strings.Repeat(",ip=10.0.0.1", net.MaxIPs+1),
	} {
		if o, err := net.ParseOptions(bad); err == nil {
			t.Errorf("%q was taken for %+v", bad, o)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: more than a line: %v", bad, err)
		}
	}
}
