package vmm

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testcert"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
)

// A guest moves over TLS, by TCP and by a unix socket whose path is the address, and not
// without the certificates.
func TestVMMigratesOverTLS(t *testing.T) {
	ca := testcert.NewCA(t, "the CA")
	server, client := ca.Server(ca.Issue(t, "destination")), ca.Client(ca.Issue(t, "source"), "destination")
	vm := obeying(t)
	for _, network := range []string{"tcp", "unix"} {
		ln := listen(t)
		address := ln.Addr().String()
		if network == "unix" {
			ln.Close()
			path := filepath.Join(t.TempDir(), "s")
			var err error
			ln, err = net.Listen("unix", path)
			check(t, err)
			address = "unix:" + path
		}
		con := vmtest.NewTape()
		receiver, err := NewReceiver(ReceiveConfig{Listener: ln, TLS: server, Serial: con, Log: vmtest.Log(t)})
		check(t, err)
		next := run(t, receiver, con)
		next.is(t, StateReceiving)

		m, err := vm.StartMigration(address, migrate.Options{})
		check(t, err)
		if r := result(t, m); !strings.Contains(r.Error, "takes guests by TLS only") {
			t.Errorf("without TLS: %q", r.Error)
		}
		vm.con.Type("x")
		vm.con.Await(t, "Bx")
		m, err = vm.StartMigration(address, migrate.Options{VerifyPages: true, DowntimeLimit: patience, TLS: client})
		check(t, err)
		if r := result(t, m); r.Status != "completed" {
			t.Fatalf("%+v", r)
		}
		next.is(t, StateRunning)
		vm.ends(t, Migrated, "the guest runs at "+address+" now")
		vm = next
		vm.con.Write([]byte("B"))
	}
	vm.con.Type("p")
	vm.ends(t, PoweredOff, "")
}

// A configuration that demands too little is refused where it is given.
func TestTLSThatDemandsTooLittle(t *testing.T) {
	ca := testcert.NewCA(t, "the CA")
	server := ca.Server(ca.Issue(t, "destination"))
	server.ClientCAs = nil
	ln := listen(t)
	defer ln.Close()
	_, err := NewReceiver(ReceiveConfig{Listener: ln, TLS: server})
	if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "must name the CA of the sources") {
		t.Error(err)
	}
	client := ca.Client(ca.Issue(t, "source"), "destination")
	client.InsecureSkipVerify = true
	_, err = obeying(t).StartMigration("host:1", migrate.Options{TLS: client})
	if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "must verify the destination's certificate") {
		t.Error(err)
	}
}
