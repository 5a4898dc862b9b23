package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/migrate/hosttls"
	"github.com/govmm/govmm/vmm/api"
	"github.com/spf13/cobra"
)

// tlsDirVariable is --tls-dir for who gives none.
const tlsDirVariable = "GOVMM_TLS_DIR"

// registerTLSDir makes --tls-dir a flag of a command that talks to another host.
func registerTLSDir(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "tls-dir", os.Getenv(tlsDirVariable),
		"migrate by TLS, with ca.pem, cert.pem and key.pem of `DIR` (govmm certs --help); without the flag "+tlsDirVariable+" says which, and --tls-dir= turns it off")
	_ = cmd.MarkFlagDirname("tls-dir") // it exists
}

// allowed reads the values of --tls-allow.
func allowed(patterns []string) (all []hosttls.Pattern, err error) {
	for _, s := range patterns {
		p, err := hosttls.ParsePattern(s)
		if err != nil {
			return nil, fmt.Errorf("--tls-allow %w", err)
		}
		all = append(all, p)
	}
	return all, nil
}

// address is --to with an absolute path, since the VM's process may be in another
// directory.
func (f *migrateFlags) address() (string, error) {
	path, ok := strings.CutPrefix(f.to, migrate.UnixPrefix)
	if !ok || path == "" {
		return f.to, nil
	}
	path, err := filepath.Abs(path)
	return migrate.UnixPrefix + path, err
}

// checkTLS reports what is wrong with the flags of TLS, without looking at files.
func (f *migrateFlags) checkTLS() error {
	if f.tlsDir == "" {
		if f.serverName != "" {
			return errors.New("--tls-server-name needs --tls-dir DIR")
		}
		return nil
	}
	_, err := hosttls.ServerName(f.to, f.serverName)
	return err
}

// credentials reads the files for a request: the VM's process is not free to read them.
// It also finds what makes no sense before anybody is asked.
func (f *migrateFlags) credentials() (*api.TLS, error) {
	if f.tlsDir == "" || f.cancel {
		return nil, nil
	}
	name, err := hosttls.ServerName(f.to, f.serverName)
	if err != nil {
		return nil, err
	}
	c, err := hosttls.ReadDir(f.tlsDir)
	if err == nil {
		_, err = c.Client(name)
	}
	if err != nil {
		return nil, fmt.Errorf("--tls-dir %s: %w", f.tlsDir, err)
	}
	return credentialsOf(c, name), nil
}

func credentialsOf(c hosttls.Credentials, serverName string) *api.TLS {
	return &api.TLS{CA: string(c.CA), Cert: string(c.Cert), Key: string(c.Key), ServerName: serverName}
}

// demoTLS is what the two sides of the demo have; the zero value: no TLS.
type demoTLS struct {
	source      *api.TLS
	destination string // --tls-dir
}

// newDemoTLS makes an authority and two certificates in a directory.
func newDemoTLS(dir string) (t demoTLS, err error) {
	from, until := validity(1)
	authority := filepath.Join(dir, "ca")
	if err := hosttls.CreateCA(authority, from, until); err != nil {
		return t, err
	}
	ca, err := hosttls.OpenCA(authority)
	if err != nil {
		return t, err
	}
	const name = "127.0.0.1"
	source := filepath.Join(authority, "source")
	t.destination = filepath.Join(authority, "destination")
	if err := errors.Join(ca.Issue(source, []string{name}, from, until), ca.Issue(t.destination, []string{name}, from, until)); err != nil {
		return t, err
	}
	c, err := hosttls.ReadDir(source)
	t.source = credentialsOf(c, name)
	return t, err
}
