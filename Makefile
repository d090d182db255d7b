# make                          build what is installed
# make install [PREFIX=/usr/local] [DESTDIR=]
# make uninstall                remove what `make install` with the same settings puts there
# make deb                      a Debian package of the same files
# make deb-cuda                 a Debian package of the daemon for NVIDIA cards (tests/gpu/build.sh builds it, in 25 minutes)
# make check                    the units and everything else that is installed, as far as that needs no root
#
# PROFILE=release|dev           which build; NO_BUILD=1: take what is built already (for `sudo make install`)
#
# The files below systemd/ are true for PREFIX=/usr; for another prefix, paths in them are changed on the way.

PREFIX     = /usr/local
SYSCONFDIR = /etc
PROFILE    = release
NO_BUILD   =
CARGO      = cargo
INSTALL    = install
STRIP      = strip

TARGET     := $(or $(CARGO_TARGET_DIR),target)
BUILT      := $(TARGET)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))

bindir     = $(PREFIX)/bin
libdir     = $(PREFIX)/lib
datadir    = $(PREFIX)/share
docdir     = $(datadir)/doc/blocklora
mandir     = $(datadir)/man
unitdir    = $(libdir)/systemd/system
userunitdir = $(libdir)/systemd/user
plugindir  = $(libdir)/blocklora/plugins
starterdir = $(datadir)/blocklora/starter
# The bus and polkit look for these in /etc and /usr only.
policydir  = $(if $(filter /usr,$(PREFIX)),/usr/share,$(SYSCONFDIR))/dbus-1/system.d
polkitdir  = /usr/share/polkit-1

D := $(DESTDIR)
MANIFESTS := $(filter-out %/Cargo.toml,$(wildcard plugins/*/*.toml))

.PHONY: all build install uninstall deb deb-cuda check
all: build

build:
ifeq ($(NO_BUILD),)
	$(CARGO) build --locked --workspace --lib --bins --profile $(PROFILE)
endif

# $(call data,SOURCE,FOLDER): a file as it is. $(call text,SOURCE,FOLDER): a file with the prefix's paths in it.
data = $(INSTALL) -D -m 0644 -t $(D)$(2) $(1)
text = $(INSTALL) -d $(D)$(2) && sed -e 's|/usr/bin/blocklora|$(bindir)/blocklora|g' \
	-e 's|/usr/lib/blocklora|$(libdir)/blocklora|g' -e 's|/usr/share/blocklora|$(datadir)/blocklora|g' \
	-e 's|/usr/share/doc/blocklora|$(docdir)|g' \
	$(1) > $(D)$(2)/$(notdir $(1)) && chmod 0644 $(D)$(2)/$(notdir $(1))

install: build
	$(INSTALL) -D -m 0755 -t $(D)$(bindir) $(BUILT)/blocklora $(BUILT)/blocklorad
	$(STRIP) --strip-unneeded $(D)$(bindir)/blocklora $(D)$(bindir)/blocklorad
# A plugin is a library and its manifest, in the folder of the ABI's major version that the manifest names.
	for manifest in $(MANIFESTS); do \
		field() { sed -n "s/^$$1 = \"\(.*\)\"/\\1/p" $$manifest; }; \
		abi=$$(field abi) library=$$(field library) && [ -n "$$abi" ] && [ -n "$$library" ] && \
		$(INSTALL) -D -m 0644 -t "$(D)$(plugindir)/$${abi%%.*}" $$manifest $(BUILT)/$$library && \
		$(STRIP) --strip-unneeded "$(D)$(plugindir)/$${abi%%.*}/$$library" || exit 1; done
	$(call text,systemd/system/blocklora.service,$(unitdir))
	$(call text,systemd/system/blocklora.socket,$(unitdir))
	$(call text,systemd/user/blocklora.service,$(userunitdir))
	$(call text,systemd/user/blocklora.socket,$(userunitdir))
	$(call data,systemd/sysusers/blocklora.conf,$(libdir)/sysusers.d)
	$(call data,systemd/tmpfiles/blocklora.conf,$(libdir)/tmpfiles.d)
	$(call data,systemd/dbus/system.d/org.blocklora.Daemon1.conf,$(policydir))
	$(call text,systemd/dbus/system-services/org.blocklora.Daemon1.service,$(datadir)/dbus-1/system-services)
	$(call text,systemd/dbus/services/org.blocklora.Daemon1.service,$(datadir)/dbus-1/services)
	$(call data,$(wildcard sdk/client/interfaces/*.xml),$(datadir)/dbus-1/interfaces)
	$(call data,systemd/polkit/org.blocklora.Daemon1.policy,$(polkitdir)/actions)
	$(call data,systemd/polkit/blocklora.rules,$(polkitdir)/rules.d)
# All settings, as comments: both daemons read this file, and defaults may change.
	$(INSTALL) -d $(D)$(SYSCONFDIR)/blocklora && sed 's/^[a-z_]* = /#&/' daemon/service/blocklora.toml \
		> $(D)$(SYSCONFDIR)/blocklora/blocklora.toml && chmod 0644 $(D)$(SYSCONFDIR)/blocklora/blocklora.toml
	cd daemon/starter && for file in $$(find model clip concepts adapters -type f ! -name '*.py') LICENSES.md README.md; do \
		$(INSTALL) -D -m 0644 "$$file" "$(D)$(starterdir)/$$file" || exit 1; done
	$(call data,LICENSE-MIT LICENSE-APACHE README.md docs/guide.md docs/install.md,$(docdir))
	$(call data,systemd/drop-ins/gpu.conf,$(docdir)/examples)
	$(INSTALL) -d $(D)$(mandir)/man1 && $(BUILT)/blocklora __man $(D)$(mandir)/man1 && chmod 0644 $(D)$(mandir)/man1/*
	$(call text,systemd/man/blocklorad.8,$(mandir)/man8)
	for shell in bash:bash-completion/completions/blocklora zsh:zsh/site-functions/_blocklora \
			fish:fish/vendor_completions.d/blocklora.fish; do \
		to="$(D)$(datadir)/$${shell#*:}" && $(INSTALL) -d "$$(dirname "$$to")" && \
		$(BUILT)/blocklora __completions "$${shell%%:*}" > "$$to" && chmod 0644 "$$to" || exit 1; done
ifeq ($(D),)
	@echo 'Installed. To run it as a system service, as root:'
	@echo '  systemd-sysusers && systemd-tmpfiles --create blocklora.conf'
	@echo '  systemctl daemon-reload && systemctl reload dbus && systemctl enable --now blocklora.socket'
endif

# The same install into a scratch folder says what there is to remove. Settings that were changed stay.
uninstall:
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	$(MAKE) --no-print-directory install NO_BUILD=1 PREFIX='$(PREFIX)' PROFILE='$(PROFILE)' DESTDIR="$$scratch" >/dev/null && \
	(cd "$$scratch" && find . -type f) | sort | while read -r file; do \
		case "$$file" in \
		./etc/blocklora/*) cmp -s "$$scratch/$$file" "$(D)/$$file" || continue ;; \
		esac; \
		rm -f "$(D)/$$file"; rmdir -p --ignore-fail-on-non-empty "$(D)/$$(dirname "$$file")" 2>/dev/null || true; done

deb: build
	systemd/debian/build '$(PROFILE)' '$(TARGET)'

deb-cuda:
ifeq ($(NO_BUILD),)
	tests/gpu/build.sh '$(TARGET)/cuda'
endif
	systemd/debian/build-cuda '$(TARGET)/cuda/bin/blocklorad-cuda' '$(TARGET)'

check: build
	tests/systemd/check '$(PROFILE)'
